"""A job's network as the launcher makes it: its modes, and a private one's gateway."""
