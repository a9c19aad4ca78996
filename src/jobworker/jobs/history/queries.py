"""The SQL of the history: each function executes the statements of one write or one query.

The functions that write run in the writer's thread, within its transaction. The others run in the
thread of a reader. Both raise apsw.Error. Functions that decode a record raise InvalidParams or
MalformedJSON if it is damaged.
"""

import logging
import sys
from collections.abc import Collection
from datetime import datetime
from pathlib import Path

import apsw

from jobworker.jobs.history.job_note import write_note
from jobworker.jobs.history.search import NAME
from jobworker.jobs.history.spec_json import spec_pieces
from jobworker.model.job import JobId, JobRecord, JobSpec
from jobworker.model.lifecycle import LIVE, TERMINAL
from jobworker.model.summary import MAX_KEPT, summarize, whole, with_labels, without_bulk
from jobworker.serialization.convert import structure, unstructure
from jobworker.serialization.json_text import dumps, loads

log = logging.getLogger("jobworker.jobs")

MAX_READ_BYTES = 2 * MAX_KEPT
"""The longest request, as JSON, that is read when the history is opened. A longer one is read when
its job starts or when a client asks for it."""
MANY_UNFINISHED = 100
_STORED_LABELS = """
    SELECT label.key, label.value FROM jobs, json_each(
        CASE WHEN EXISTS (SELECT 1 FROM json_each(record, '$.abridged') WHERE value = 'labels')
        THEN (SELECT spec -> '$.labels' FROM specs WHERE job = jobs.id)
        ELSE record -> '$.spec.labels' END
    ) AS label WHERE jobs.id = :job
    UNION ALL SELECT :name, record ->> '$.spec.name' FROM jobs
        WHERE id = :job AND record ->> '$.spec.name' <> ''"""
"""The rows that the table `labels` has of a job, without its id. The whole request is read only if
the summary does not have all labels."""


def put(record: JobRecord, spools: Path | None, connection: apsw.Connection) -> None:
    """Write a new or changed record, and its note if `spools`, the output's directory, is given."""
    if spools is not None:
        write_note(spools, record)
    summary = summarize(record)
    text = dumps(unstructure(summary))
    connection.execute(
        "UPDATE jobs SET state = ?, record = ? WHERE id = ?", (record.state.value, text, record.id)
    )
    if connection.changes():
        return
    connection.execute(
        "INSERT INTO jobs (id, state, owner, created_at, record) VALUES (?, ?, ?, ?, ?)",
        (record.id, record.state.value, record.owner, record.created_at.isoformat(), text),
    )
    # The request of a job never changes, so its labels and its JSON are written once.
    connection.executemany(
        "INSERT OR IGNORE INTO labels (name, value, job) VALUES (?, ?, ?)", _labels_of(record)
    )
    if summary.abridged and not record.abridged:
        connection.execute(
            "INSERT OR REPLACE INTO specs (job, spec) VALUES (?, ?)",
            (record.id, "".join(spec_pieces(record.spec, summary))),
        )


def _labels_of(record: JobRecord) -> list[tuple[str, str, int]]:
    named = [(NAME, record.spec.name)] if record.spec.name else []
    return [(name, value, record.id) for name, value in (*record.spec.labels.items(), *named)]


def mark_output_removed(
    jobs: Collection[JobId], when: datetime, connection: apsw.Connection
) -> None:
    """See `History.mark_output_removed`."""
    connection.executemany(
        "UPDATE jobs SET record = json_set(record, '$.output_removed_at', ?) "
        "WHERE id = ? AND json_extract(record, '$.output_removed_at') IS NULL",
        [(unstructure(when), job) for job in jobs],
    )


def delete(job: JobId, connection: apsw.Connection) -> None:
    """See `History.remove`.

    SQLite reads the labels, outside of the interpreter's lock: a large request takes a quarter of a
    second to decode, for which every other write would wait.
    """
    labels = connection.execute(_STORED_LABELS, {"job": job, "name": NAME}).fetchall()
    connection.executemany(
        "DELETE FROM labels WHERE name = ? AND value = ? AND job = ?",
        [(name, value, job) for name, value in labels],
    )
    connection.execute("DELETE FROM specs WHERE job = ?", (job,))
    connection.execute("DELETE FROM jobs WHERE id = ?", (job,))


def mark_output_missing(job: JobId, connection: apsw.Connection) -> None:
    """See `History.mark_output_missing`."""
    connection.execute(
        "INSERT OR IGNORE INTO removed SELECT id FROM jobs "
        "WHERE id = ? AND json_extract(record, '$.output_removed_at') IS NULL",
        (job,),
    )


def select_with_output(connection: apsw.Connection) -> dict[JobId, str]:
    """See `History.with_output`."""
    marks = ", ".join("?" * len(TERMINAL))
    rows = connection.execute(
        f"SELECT id, owner FROM jobs INDEXED BY jobs_with_output WHERE state IN ({marks}) "  # noqa: S608
        "AND json_extract(record, '$.output_removed_at') IS NULL",
        tuple(state.value for state in TERMINAL),
    )
    return {JobId(int(str(job))): sys.intern(str(owner)) for job, owner in rows}


def select_known(jobs: Collection[JobId], connection: apsw.Connection) -> frozenset[JobId]:
    """See `History.known`."""
    query = "SELECT id FROM jobs WHERE id IN (SELECT value FROM json_each(?))"
    rows = connection.execute(query, (dumps(list(jobs)),))
    return frozenset(JobId(int(str(row[0]))) for row in rows)


def select_removed(jobs: Collection[JobId], connection: apsw.Connection) -> frozenset[JobId]:
    """See `History.removed_without_output`."""
    query = "SELECT job FROM removed WHERE job IN (SELECT value FROM json_each(?))"
    rows = connection.execute(query, (dumps(list(jobs)),))
    return frozenset(JobId(int(str(row[0]))) for row in rows)


def select_summary(job: JobId, connection: apsw.Connection) -> JobRecord | None:
    """See `History.summary`."""
    text = connection.execute("SELECT record FROM jobs WHERE id = ?", (job,)).get
    return None if text is None else structure(JobRecord, loads(str(text)))


def select_whole(job: JobId, connection: apsw.Connection) -> JobRecord | None:
    """See `History.get`."""
    query = "SELECT record, spec FROM jobs LEFT JOIN specs ON job = id WHERE id = ?"
    row = connection.execute(query, (job,)).fetchone()
    return None if row is None else _whole(*row)


def select_spec(job: JobId, connection: apsw.Connection) -> str | None:
    """See `History.spec`."""
    text = connection.execute("SELECT spec FROM specs WHERE job = ?", (job,)).get
    return None if text is None else str(text)


def select_unfinished(connection: apsw.Connection) -> list[JobRecord]:
    """The records of the jobs that have not ended, as `model.summary.without_bulk` returns them."""
    states = tuple(state.value for state in LIVE)
    marks = ", ".join("?" * len(states))
    count = connection.execute(
        f"SELECT count(*) FROM jobs WHERE state IN ({marks})",  # noqa: S608
        states,
    ).get
    if int(str(count)) >= MANY_UNFINISHED:
        log.info("reading %s jobs of an earlier service", count)
    query = (
        "SELECT id, record, spec FROM jobs "  # noqa: S608
        "LEFT JOIN specs ON job = id AND octet_length(spec) <= ? "
        f"WHERE state IN ({marks})"
    )
    rows = connection.execute(query, (MAX_READ_BYTES, *states))
    return [_without_bulk(connection, *row) for row in rows]


def _without_bulk(
    connection: apsw.Connection, job: object, text: object, spec: object
) -> JobRecord:
    """The record of a job without its request's bulk; `text` is the summary as JSON.

    `spec` is the JSON of the whole request if that is small, else None. A thousand jobs may wait
    with a request of a megabyte each, which would take minutes to decode. So of a large request
    only the labels are decoded, and only if the summary does not have all of them.
    """
    record = _whole(text, spec)
    if "labels" in record.abridged:
        query = "SELECT spec -> '$.labels' FROM specs WHERE job = ?"
        labels = connection.execute(query, (int(str(job)),)).get
        if labels is not None:
            record = with_labels(record, structure(dict[str, str], loads(str(labels))))
    return without_bulk(record)


def _whole(text: object, spec: object) -> JobRecord:
    summary = structure(JobRecord, loads(str(text)))
    return (
        summary
        if spec is None
        else whole(summary, structure(JobSpec, loads(str(spec), bounded=True)))
    )
