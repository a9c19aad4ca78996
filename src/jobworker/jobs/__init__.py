"""Running jobs: their supervision, their output and their history. Imports no wire protocol."""
