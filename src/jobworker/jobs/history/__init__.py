"""Records that outlive the service: the history in SQLite, the audit log, notes beside outputs."""
