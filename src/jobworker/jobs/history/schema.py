"""The history's tables, and the steps that bring an older file to today's version.

Each step of `MIGRATIONS` raises `PRAGMA user_version` by one, in a transaction of its own, so a
file is never between two versions. New steps are added at the end. A released step never changes.
The service refuses a file of a newer version, since it would not keep data that it does not know.

The audit table is append-only: triggers refuse UPDATE, DELETE, and an INSERT that replaces a row.
They hold against every statement, also of this service, but not against a program that may write
to the file itself.
"""

import logging
from pathlib import Path

import apsw

from jobworker.errors import ConfigError
from jobworker.model.job import JobRecord
from jobworker.model.summary import summarize
from jobworker.serialization.convert import structure, unstructure
from jobworker.serialization.json_text import dumps, loads

log = logging.getLogger("jobworker.jobs")

# Step 3 makes summaries of the records of older versions. There may be a million, so SQLite alone
# takes the variables out of short records. Only long records pass through `model.summary`.
_LARGE = "octet_length(record) > 2048"
_HAS_VARIABLES = (
    "(record -> '$.spec.environment' <> '{}' OR record -> '$.spec.secret_environment' <> '{}')"
)
_WITHOUT_VARIABLES = """json_set(record,
        '$.abridged', json(CASE
            WHEN record -> '$.spec.secret_environment' = '{}' THEN '["environment"]'
            WHEN record -> '$.spec.environment' = '{}' THEN '["secret_environment"]'
            ELSE '["environment","secret_environment"]' END),
        '$.spec.environment', json('{}'),
        '$.spec.secret_environment', json('{}'))"""

MIGRATIONS = (
    """
    CREATE TABLE jobs (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        state TEXT NOT NULL,
        owner TEXT NOT NULL,
        created_at TEXT NOT NULL,
        record TEXT NOT NULL -- the JobRecord as JSON; since step 3 its summary (model.summary)
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
    f"""
    CREATE TABLE labels ( -- and names, as the label ''
        name TEXT NOT NULL,
        value TEXT NOT NULL,
        job INTEGER NOT NULL,
        PRIMARY KEY (name, value, job)
    ) WITHOUT ROWID;
    INSERT INTO labels SELECT label.key, label.value, jobs.id
        FROM jobs, json_each(jobs.record, '$.spec.labels') AS label ORDER BY 1, 2, 3;
    INSERT INTO labels SELECT '', record ->> '$.spec.name', id
        FROM jobs WHERE record ->> '$.spec.name' <> '' ORDER BY 2, 3;
    CREATE TABLE specs ( -- what was asked for, of jobs whose record is abridged
        job INTEGER PRIMARY KEY,
        spec TEXT NOT NULL -- the JobSpec as JSON
    );
    INSERT INTO specs SELECT id, record -> '$.spec' FROM jobs WHERE {_LARGE} OR {_HAS_VARIABLES};
    UPDATE jobs SET record = {_WITHOUT_VARIABLES} WHERE {_HAS_VARIABLES} AND NOT {_LARGE};
    UPDATE jobs SET record = summary_of(record) WHERE {_LARGE};
    DROP INDEX jobs_by_owner;
    CREATE INDEX jobs_by_owner ON jobs (owner, state, id);
    CREATE INDEX jobs_with_output ON jobs (owner, id)
        WHERE json_extract(record, '$.output_removed_at') IS NULL;
    """,  # noqa: S608 - our own words
    """
    CREATE TABLE removed (job INTEGER PRIMARY KEY); -- jobs removed while their output was missing
    """,
)


def _summary_of(text: str) -> str:
    """The JSON of a record's summary, given the JSON of the record. Steps call it in SQL."""
    return dumps(unstructure(summarize(structure(JobRecord, loads(text)))))


APPLICATION_ID = 0x4A4F4257
"""The number in the file's header by which a history is known (PRAGMA application_id): "JOBW". The
first versions left it at 0."""
_CHECKED_BYTES = 64 << 20
"""The largest file that is checked page by page at each start. The check takes some 100 ms."""
_COLUMNS = {"id", "state", "owner", "created_at", "record"}


def damaged(path: Path, why: str) -> ConfigError:
    """The error for a history that exists and cannot be used. The service leaves it unchanged."""
    return ConfigError(
        f"cannot use the history {path}: {why}",
        remedy="put a copy back, or move the file and those named like it (-wal, -shm) away: the "
        "service then makes a new one, of what it finds of jobs and their output",
    )


def check_file(connection: apsw.Connection, path: Path) -> None:
    """Check that a file is undamaged and either a history or empty, before anything changes it.

    Raises ConfigError, also for a history of a newer version, and apsw.Error.
    """
    version = int(str(connection.pragma("user_version")))
    tables = connection.execute("SELECT count(*) FROM sqlite_master").get
    columns = {str(row[1]) for row in connection.execute("PRAGMA table_info(jobs)")}
    is_new = not (version or tables)
    is_ours = version > 0 and columns >= _COLUMNS
    if connection.pragma("application_id") not in (0, APPLICATION_ID) or not (is_new or is_ours):
        raise damaged(path, "it is a database of another program")
    if version > len(MIGRATIONS):
        raise ConfigError(
            f"cannot use the history {path}: its schema has version {version}, "
            f"this service knows version {len(MIGRATIONS)}",
            remedy="run the version of jobworker that wrote it, or a newer one",
        )
    if path.stat().st_size <= _CHECKED_BYTES:
        found = connection.execute("PRAGMA quick_check(1)").get
        if found != "ok":
            raise damaged(path, f"it is damaged: {found}")


def migrate(connection: apsw.Connection, path: Path) -> None:
    """Bring a new or older file to today's version. Raises ConfigError, apsw.Error."""
    check_file(connection, path)
    version = int(str(connection.pragma("user_version")))
    connection.create_scalar_function("summary_of", _summary_of, 1)  # type: ignore[arg-type]
    if 0 < version < len(MIGRATIONS):
        log.info(
            "bringing the history %s from version %d to %d: about a minute for a million jobs",
            path,
            version,
            len(MIGRATIONS),
        )
    for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
        connection.execute(f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {number}; COMMIT")
    if connection.pragma("application_id") != APPLICATION_ID:
        connection.pragma("application_id", APPLICATION_ID)
