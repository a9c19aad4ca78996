"""The history's tables, and how an older file becomes one of today.

Each step of `MIGRATIONS` raises `PRAGMA user_version` by one, in a transaction of its own, so a
file is never between two versions. Steps are only ever added at the end. A file of a newer version
is refused: an older service would not keep what it does not know of.

The audit table takes new rows and nothing else: triggers refuse UPDATE and DELETE, and an INSERT
over a row that is there. They hold against every statement, ours included; not against someone who
may write to the file itself.
"""

from pathlib import Path

import apsw

from jobworker.errors import ConfigError

MIGRATIONS = (
    """
    CREATE TABLE jobs (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        state TEXT NOT NULL,
        owner TEXT NOT NULL,
        created_at TEXT NOT NULL,
        record TEXT NOT NULL -- the JobRecord as JSON
    );
    CREATE INDEX jobs_by_state ON jobs (state, id);
    """,
    """
    CREATE INDEX jobs_by_owner ON jobs (owner, id);
    CREATE TABLE audit (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        at TEXT NOT NULL, -- UTC, ISO 8601, always to the microsecond: text sorts as time does
        name TEXT NOT NULL,
        serial TEXT NOT NULL,
        role TEXT NOT NULL,
        peer TEXT NOT NULL,
        action TEXT NOT NULL,
        job INTEGER,
        outcome TEXT NOT NULL,
        detail TEXT NOT NULL
    );
    CREATE INDEX audit_by_time ON audit (at);
    CREATE INDEX audit_by_name ON audit (name, id);
    CREATE INDEX audit_by_job ON audit (job, id) WHERE job IS NOT NULL;
    CREATE TRIGGER audit_no_update BEFORE UPDATE ON audit
        BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;
    CREATE TRIGGER audit_no_delete BEFORE DELETE ON audit
        BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;
    CREATE TRIGGER audit_no_replace BEFORE INSERT ON audit
        WHEN EXISTS (SELECT 1 FROM audit WHERE id = NEW.id)
        BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;
    """,
)


def migrate(connection: apsw.Connection, path: Path) -> None:
    """Bring an open file, new or old, to today's version. Raises ConfigError, apsw.Error."""
    version = int(str(connection.pragma("user_version")))
    if version > len(MIGRATIONS):
        raise ConfigError(
            f"cannot use the history {path}: its schema has version {version}, "
            f"this service knows version {len(MIGRATIONS)}",
            remedy="run the version of jobworker that wrote it, or a newer one",
        )
    for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
        connection.execute(f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {number}; COMMIT")
