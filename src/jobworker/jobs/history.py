"""The history: every job's record in SQLite, durable before anyone is told of it.

One connection, and all that touches it runs in one thread at a time, so that SQLite's locking
never matters. Writes that arrive while one is under way share the next transaction (a commit
waits for the disk, and a hundred jobs that end together should not wait a hundred times).

What must hold: an id is handed out once, also across crashes. The next id is kept by SQLite's
AUTOINCREMENT bookkeeping, and a record is committed before its id leaves the service. What
becomes of records that an earlier service left unfinished, `jobs.takeover` says.

SQLite comes from apsw: the one in Python's standard library may be old enough to have the
WAL-reset fault (fixed in 3.51.3).
"""

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

import apsw
import trio
from attrs import Factory, define

from jobworker.convert import dumps, loads, structure, unstructure
from jobworker.errors import ConfigError, InternalError
from jobworker.jobs.audit import FILE, AuditRow, append_lines, insert_rows
from jobworker.jobs.schema import migrate
from jobworker.model.job import JobId, JobRecord
from jobworker.model.lifecycle import LIVE, TERMINAL, State

T = TypeVar("T")

MAX_PAGE_BYTES = 2 << 20
"""Where a page of records ends early: a command line may have a megabyte."""


@define(eq=False)
class _Write:
    """A record on its way to the disk."""

    record: JobRecord
    done: trio.Event = Factory(trio.Event)
    fault: Exception | None = None


@define(eq=False)
class History:
    """All jobs ever, by id."""

    _connection: apsw.Connection
    _path: Path
    _next_id: int
    unfinished: tuple[JobRecord, ...] = ()
    """Jobs that an earlier service left waiting or alive, as they were when this was opened."""
    _thread: trio.CapacityLimiter = Factory(lambda: trio.CapacityLimiter(1))
    _waiting: list[_Write] = Factory(list)
    _writing: bool = False

    @classmethod
    def open(cls, path: Path) -> "History":
        """Open or create the history at `path`.

        Raises ConfigError where the file cannot be used. Blocks: call before Trio runs.
        """
        with ExitStack() as undo:
            try:
                connection = apsw.Connection(str(path))
                undo.callback(connection.close)
                connection.pragma("journal_mode", "wal")
                connection.pragma("synchronous", "full")
                migrate(connection, path)
                last = connection.execute("SELECT seq FROM sqlite_sequence WHERE name='jobs'").get
                history = cls(connection, path, int(last or 0) + 1)
                history.unfinished = tuple(
                    history._select(states=LIVE, owner=None, labels={}, limit=-1, before=None)
                )
            except (apsw.Error, OSError) as error:
                raise ConfigError(
                    f"cannot open the history {path}: {error}",
                    remedy="check worker.state_dir in the configuration, its owner and free space",
                ) from error
            undo.pop_all()
        return history

    def close(self) -> None:
        """Close the file; nothing may be under way."""
        self._connection.close()

    def take_id(self) -> JobId:
        """The next id, never given before."""
        taken, self._next_id = self._next_id, self._next_id + 1
        return JobId(taken)

    def pass_over(self, job: JobId) -> None:
        """Never give `job` or a lower id: somebody may have seen it."""
        self._next_id = max(self._next_id, job + 1)

    @property
    def next_id(self) -> JobId:
        """The id that the next job will get."""
        return JobId(self._next_id)

    async def put(self, record: JobRecord) -> None:
        """Store `record`, new or changed; returns once it is on the disk.

        Not cancelled half-way: a record that was handed over is written. Raises InternalError
        where the disk refuses; the record is not stored then.
        """
        write = _Write(record)
        self._waiting.append(write)
        with trio.CancelScope(shield=True):
            if not self._writing:
                await self._write_all()
            await write.done.wait()
        if write.fault is not None:
            raise InternalError(
                f"cannot record job {record.id} in the history: {write.fault}",
                remedy="check the disk that holds worker.state_dir",
            ) from write.fault

    async def _write_all(self) -> None:
        """Write what waits, in as few transactions as the disk's pace allows."""
        self._writing = True
        try:
            while self._waiting:
                batch, self._waiting = self._waiting, []
                fault: Exception | None = None
                try:
                    await self._in_thread(partial(self._commit, [w.record for w in batch]))
                except (apsw.Error, ValueError) as error:  # ValueError: text that is no Unicode
                    fault = error
                for write in batch:
                    write.fault = fault
                    write.done.set()
        finally:
            self._writing = False

    async def note_removed(self, jobs: Collection[JobId], when: datetime) -> None:
        """Note in the records of ended jobs that their output was removed, all at once.

        Those that say so already, and jobs that there are not, stay as they are. Raises
        InternalError where the disk refuses.
        """
        try:
            await self._in_thread(partial(self._note_removed, jobs, when))
        except apsw.Error as error:
            raise InternalError(
                f"cannot note in the history that output was removed: {error}",
                remedy="check the disk that holds worker.state_dir",
            ) from error

    async def with_output(self) -> frozenset[JobId]:
        """The ended jobs whose records do not say that their output was removed."""
        return await self._in_thread(partial(self._select_with_output))

    async def remove(self, job: JobId) -> None:
        """Forget a job for good; its id is not given again. One that is not there is fine.

        Raises InternalError where the disk refuses.
        """
        try:
            await self._in_thread(partial(self._delete, job))
        except apsw.Error as error:
            raise InternalError(
                f"cannot remove job {job} from the history: {error}",
                remedy="check the disk that holds worker.state_dir",
            ) from error

    async def note(self, rows: Sequence[AuditRow]) -> None:
        """Add rows to the audit log, its table and its file. Raises InternalError."""
        try:
            await self._in_thread(partial(self._note, rows))
        except (apsw.Error, OSError) as error:
            raise InternalError(
                f"cannot write the audit log: {error}; {len(rows)} rows are lost",
                remedy="check the disk that holds worker.state_dir",
            ) from error

    async def jobs_of(self, owner: str) -> frozenset[JobId]:
        """The ids of all jobs of one owner."""
        return await self._in_thread(partial(self._select_ids, owner))

    async def get(self, job: JobId) -> JobRecord | None:
        """The record of one job, or None."""
        found = await self._in_thread(
            partial(self._query, "SELECT record FROM jobs WHERE id = ?", (job,))
        )
        return found[0] if found else None

    async def latest(
        self,
        *,
        states: Collection[State] = frozenset(State),
        owner: str | None = None,
        labels: Mapping[str, str] | None = None,
        limit: int,
        before: int | None = None,
    ) -> list[JobRecord]:
        """At most `limit` records in `states`, with all `labels` and ids below `before`.

        Newest first.

        Those of `owner` alone, where one is given. Fewer, but at least one of those that there are,
        where they exceed `MAX_PAGE_BYTES`.
        """
        select = partial(
            self._select,
            states=states,
            owner=owner,
            labels=labels or {},
            limit=limit,
            before=before,
        )
        return await self._in_thread(select)

    async def _in_thread(self, work: "partial[T]") -> T:
        return await trio.to_thread.run_sync(work, limiter=self._thread)

    # --- in the thread ----------------------------------------------------------------------

    def _commit(self, records: Sequence[JobRecord]) -> None:
        with self._connection:
            self._connection.executemany(
                "INSERT INTO jobs (id, state, owner, created_at, record) VALUES (?, ?, ?, ?, ?) "
                "ON CONFLICT (id) DO UPDATE SET state = excluded.state, record = excluded.record",
                [
                    (r.id, r.state.value, r.owner, r.created_at.isoformat(), _to_text(r))
                    for r in records
                ],
            )

    def _note(self, rows: Sequence[AuditRow]) -> None:
        try:
            append_lines(self._path.with_name(FILE), rows)
        finally:  # one of the two is better than none
            insert_rows(self._connection, rows)

    def _note_removed(self, jobs: Collection[JobId], when: datetime) -> None:
        with self._connection:
            self._connection.executemany(
                "UPDATE jobs SET record = json_set(record, '$.output_removed_at', ?) "
                "WHERE id = ? AND json_extract(record, '$.output_removed_at') IS NULL",
                [(unstructure(when), job) for job in jobs],
            )

    def _select_with_output(self) -> frozenset[JobId]:
        marks = ", ".join("?" * len(TERMINAL))
        rows = self._connection.execute(
            f"SELECT id FROM jobs WHERE state IN ({marks}) "  # noqa: S608
            "AND json_extract(record, '$.output_removed_at') IS NULL",
            tuple(state.value for state in TERMINAL),
        )
        return frozenset(JobId(int(str(row[0]))) for row in rows)

    def _delete(self, job: JobId) -> None:
        with self._connection:
            self._connection.execute("DELETE FROM jobs WHERE id = ?", (job,))

    def _select_ids(self, owner: str) -> frozenset[JobId]:
        rows = self._connection.execute("SELECT id FROM jobs WHERE owner = ?", (owner,))
        return frozenset(JobId(int(str(row[0]))) for row in rows)

    def _select(
        self,
        *,
        states: Collection[State],
        owner: str | None,
        labels: Mapping[str, str],
        limit: int,
        before: int | None,
    ) -> list[JobRecord]:
        marks = ", ".join("?" * len(states))
        query = (
            f"SELECT record FROM jobs WHERE state IN ({marks}) AND id < ? "  # noqa: S608
            + ("" if owner is None else "AND owner = ? ")
            + "AND json_extract(record, ?) = ? " * len(labels)
            + "ORDER BY id DESC LIMIT ?"
        )
        last = before if before is not None else 1 << 62
        owners = () if owner is None else (owner,)
        # A label's name holds nothing that would have to be quoted in a path (model.labels).
        paths = [(f'$.spec.labels."{name}"', value) for name, value in labels.items()]
        wanted = tuple(word for pair in paths for word in pair)
        values = (*(state.value for state in states), last, *owners, *wanted, limit)
        return self._query(query, values, -1 if limit < 0 else MAX_PAGE_BYTES)

    def _query(
        self, query: str, values: tuple[int | str, ...], max_bytes: int = -1
    ) -> list[JobRecord]:
        found, size = [], 0
        for (text,) in self._connection.execute(query, values):
            found.append(structure(JobRecord, loads(str(text))))
            size += len(str(text))
            if 0 <= max_bytes < size:
                break
        return found


def _to_text(record: JobRecord) -> str:
    return dumps(unstructure(record))
