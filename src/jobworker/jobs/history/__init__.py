"""Records that outlive the service: the history in SQLite, the audit, notes beside outputs."""
