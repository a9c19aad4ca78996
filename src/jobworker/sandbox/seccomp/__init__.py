"""The system-call filter: its profile, and the programs that are made of it."""
