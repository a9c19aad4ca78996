"""Running jobs: supervision, output spool and history; knows nothing of the wire."""
