"""The history: every job's record in SQLite, durable before anyone is told of it.

One connection writes, in a thread of its own (`history.writer`); a few others read
(`history.readers`), so that no search delays a job's start or end. A row has a record's summary
(`model.summary`), which is all that most questions need; what a summary leaves out has a table of
its own, written once. Labels and names have an index (`history.search`).

What must hold: an id is handed out once, also across crashes. The next id is kept by SQLite's
AUTOINCREMENT bookkeeping and, should the history get lost, by `last_id`; and a record is committed
before its id leaves the service. What becomes of records that an earlier service left unfinished,
`jobs.takeover` says.

SQLite comes from apsw: the one in Python's standard library may be old enough to have the
WAL-reset fault (fixed in 3.51.3).
"""

import errno
import logging
import os
import stat
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from datetime import datetime
from functools import partial
from pathlib import Path

import apsw
import trio
from attrs import Factory, define

from jobworker.errors import ConfigError, InternalError, InvalidParams, MalformedJSON
from jobworker.jobs.history import queries
from jobworker.jobs.history import writer as history_writer
from jobworker.jobs.history.audit import FILE, AuditRow, append_lines, insert_rows
from jobworker.jobs.history.files import HistoryFiles
from jobworker.jobs.history.job_note import write_note
from jobworker.jobs.history.last_id import LastId
from jobworker.jobs.history.readers import NO_DESCRIPTOR, Readers, lacks_descriptors, unreadable
from jobworker.jobs.history.reserved_space import ReservedSpace
from jobworker.jobs.history.schema import damaged, migrate
from jobworker.jobs.history.search import Filter, Page, find_page
from jobworker.jobs.history.writer import Work, Writer
from jobworker.model.job import JobId, JobRecord, JobSpec
from jobworker.sandbox.protocol.requests import MAX_JOB
from jobworker.serialization.convert import structure
from jobworker.serialization.json_text import loads
from jobworker.threads import in_thread

log = logging.getLogger("jobworker.jobs")

_WITHOUT = {
    "": "move it away, and put a copy back; without one the service makes a new history, of what "
    "it finds of jobs and their output",
    "-wal": "move it away, and put the file itself back; without it, what was recorded last is "
    "missing",
    "-shm": "move it away: it is made anew",
}
"""What to do where something else stands at the place of the history or of a file beside it."""
_KINDS = {stat.S_IFDIR: "a directory", stat.S_IFLNK: "a link", stat.S_IFIFO: "a FIFO"}


@define(eq=False)
class History:
    """All jobs ever, by id."""

    _writer: Writer
    _readers: Readers
    _path: Path
    _next_id: int
    _last_id: LastId
    _spools: Path | None = None
    _reading: trio.CapacityLimiter = Factory(lambda: trio.CapacityLimiter(1))
    _notes: trio.CapacityLimiter = Factory(lambda: trio.CapacityLimiter(1))
    """Of notes that are written beside the history."""
    unfinished: tuple[JobRecord, ...] = ()
    """Jobs that an earlier service left waiting or alive, as they were when this was opened, each
    without the bulk of its request (`without_bulk`)."""
    _never: set[JobId] = Factory(set)
    """Ids of which something stands in the spool directory that is no job's."""

    @classmethod
    def open(cls, path: Path, spools: Path | None = None) -> "History":
        """Open or create the history at `path`; records are also noted beside output in `spools`.

        Raises ConfigError where the file cannot be used. Blocks: call before Trio runs.
        """
        files = HistoryFiles(path)
        connection = None
        with ExitStack() as undo:
            try:
                _check_files(path)
                _keep_orphan(path)
                undo.callback(files.release)
                connection = apsw.Connection(str(path))
                undo.callback(files.leave, connection)
                connection.set_busy_timeout(int(history_writer.BUSY_SECONDS * 1000))
                with files.kept():
                    connection.pragma("user_version")  # the first read takes log and index
                migrate(connection, path)
                connection.pragma("journal_mode", "wal")
                connection.pragma("synchronous", "full")
                last = connection.execute("SELECT seq FROM sqlite_sequence WHERE name='jobs'").get
                unfinished = queries.select_unfinished(connection)
                room = ReservedSpace(path)
                room.ensure(connection)  # the first thing that changes the file
                connection.execute("BEGIN IMMEDIATE")  # or another program holds it locked
                connection.execute("ROLLBACK")
            except (apsw.CorruptError, apsw.NotADBError) as error:
                raise damaged(path, str(error)) from error
            except (apsw.Error, OSError) as error:
                why = str(error)
                remedy = "check worker.state_dir in the configuration, its owner and free space"
                if isinstance(error, apsw.BusyError | apsw.LockedError):
                    why = "another program holds it locked"
                    remedy = f"let that program end: see who has it open (fuser {path})"
                elif lacks_descriptors(error, connection):
                    why, remedy = NO_DESCRIPTOR, "raise the service's LimitNOFILE"
                elif os.path.islink(path):  # Path.is_symlink may raise the same again
                    why = f"it is a link ({why})"
                    remedy = "put the file itself there, with those beside it (-wal, -shm)"
                raise ConfigError(
                    f"cannot open the history {path}: {why}", remedy=remedy
                ) from error
            except (InvalidParams, MalformedJSON) as error:
                raise damaged(path, f"a record of it cannot be read: {error.message}") from error
            undo.pop_all()
        last_id = LastId.open(path.with_name("last-id"))
        told = last_id.read()
        if told > int(last or 0):
            log.info(
                "the history ends at job %d, and ids up to %d were given: to jobs that were "
                "refused, if it is no older copy",
                int(last or 0),
                told,
            )
        next_id = max(int(last or 0), told) + 1
        history = cls(
            Writer(connection, room, files), Readers(path), path, next_id, last_id, spools
        )
        history.unfinished = tuple(unfinished)
        return history

    def close(self) -> None:
        """Write what waits and close the file; no call may be under way. Blocks."""
        self._readers.close()
        self._writer.close()
        self._last_id.close()

    def take_id(self) -> JobId:
        """The next id, never given before; it may be told once it was kept (`keep_id`).

        Raises InternalError where ids are used up.
        """
        taken = self.next_id
        if taken > MAX_JOB:
            raise InternalError(
                f"cannot give the job an id: the last one was {taken - 1}, and none may be higher",
                remedy="stop the service and see what in its state directory has that number: "
                "last-id, a directory in spool, or the history; remove it there",
            )
        self._next_id = taken + 1
        return taken

    def keep_id(self, job: JobId) -> None:
        """Keep that this id was given, should the history get lost. Blocks; from any thread."""
        self._last_id.write(job)

    def never_give(self, job: JobId) -> None:
        """Give other ids than `job`, of which there is something that is no job's."""
        self._never.add(job)

    def pass_over(self, job: JobId) -> None:
        """Never give `job` or a lower id: somebody may have seen it."""
        self._next_id = max(self._next_id, job + 1)
        self._last_id.write(self._next_id - 1)

    @property
    def next_id(self) -> JobId:
        """The id that the next job will get."""
        job = JobId(self._next_id)
        while job in self._never:
            job = JobId(job + 1)
        return job

    async def put(self, record: JobRecord, *, is_new: bool = False) -> None:
        """Store `record`, new or changed; returns once it is on the disk.

        That of a job which is only just admitted (`is_new`) is refused where the disk has nothing
        left but what is set aside for ends.

        Not cancelled half-way: a record that was handed over is written, or refused. Raises
        InternalError where the disk refuses, or another program has the lock; then the job's note
        alone has it, whatever has refused it.
        """
        work = partial(queries.put, record, self._spools)
        try:
            await self._write(work, f"cannot record job {record.id} in the history", is_new=is_new)
        except InternalError:
            await self.keep_note(record)  # `work`, which does that too, may never have been begun
            raise

    async def keep_note(self, record: JobRecord) -> None:
        """Have the note of a job tell `record`, whatever the history does; raises nothing."""
        if self._spools is not None:
            with trio.CancelScope(shield=True):  # waits for the disk alone
                await in_thread(write_note, self._spools, record, limiter=self._notes)

    async def _write(self, work: Work, what: str, *, is_new: bool = False) -> None:
        """Have the writer do `work`; raises InternalError that begins with `what`."""
        try:
            await self._writer.write(work, is_new=is_new)
        except apsw.BusyError as error:
            raise InternalError(
                f"{what}: another program has locked it for {history_writer.BUSY_SECONDS:g} s",
                remedy="back it up by sqlite3's `.backup`, which takes no lock for long",
            ) from error
        except Exception as error:
            raise InternalError(
                f"{what}: {error}", remedy="check the disk that holds worker.state_dir"
            ) from error

    async def mark_output_removed(self, jobs: Collection[JobId], when: datetime) -> None:
        """Note in the records of ended jobs that their output was removed, all at once.

        Those that say so already, and jobs that there are not, stay as they are. Raises
        InternalError where the disk refuses.
        """
        what = "cannot note in the history that output was removed"
        await self._write(partial(queries.mark_output_removed, jobs, when), what)

    async def with_output(self) -> Mapping[JobId, str]:
        """The ended jobs whose records do not say that their output was removed: their owners."""
        return await self._readers.search(queries.select_with_output)

    async def remove(self, job: JobId) -> None:
        """Forget a job for good; its id is not given again. One that is not there is fine.

        Raises InternalError where the disk refuses.
        """
        await self._write(partial(queries.delete, job), f"cannot remove job {job} from the history")

    async def mark_output_missing(self, job: JobId) -> None:
        """Keep that a job which is to be removed had output that was not there to be removed.

        A record that says that its output was removed, or none, leaves all as it is. Raises
        InternalError where the disk refuses.
        """
        what = f"cannot remove job {job} from the history"
        await self._write(partial(queries.mark_output_missing, job), what)

    async def removed_without_output(self, jobs: Collection[JobId]) -> frozenset[JobId]:
        """Those of `jobs` that were removed while their output was missing."""
        return await self._readers.search(partial(queries.select_removed, jobs))

    async def add_audit_rows(self, rows: Sequence[AuditRow]) -> None:
        """Add rows to the audit log: its table, then its file.

        Raises InternalError where the table cannot take them; then neither has any. Rows that the
        file alone cannot take are told to the log of the service: the table has them.
        """
        what = f"cannot write {len(rows)} rows to the audit log"
        try:
            await self._write(partial(insert_rows, rows), what, is_new=True)
        except InternalError as error:
            if isinstance(error.__cause__, apsw.Error):
                raise
            if len(rows) > 1:
                for row in rows:
                    await self.add_audit_rows([row])
            else:  # another try would be vain
                log.error("%s: its row is lost: %s", error, rows)
            return
        try:
            await in_thread(append_lines, self._path.with_name(FILE), rows)
        except OSError as error:
            log.error("%d rows are in `worker audit` and not in %s: %s", len(rows), FILE, error)

    async def known(self, jobs: Collection[JobId]) -> frozenset[JobId]:
        """Those of `jobs` that have a record."""
        return await self._readers.search(partial(queries.select_known, jobs))

    async def with_output_of(self, owner: str) -> frozenset[JobId]:
        """The ids of one owner's jobs whose records do not say that their output was removed."""
        return await self._readers.look_up(partial(queries.select_with_output_of, owner), owner)

    async def get(self, job: JobId) -> JobRecord | None:
        """The record of one job, as it was put, or None."""
        return await self._readers.look_up(partial(queries.select_whole, job))

    async def summary(self, job: JobId, who: str = "") -> JobRecord | None:
        """The summary of one job's record (`model.summary`), or None; `who` asks."""
        return await self._readers.look_up(partial(queries.select_summary, job), who)

    async def spec(self, job: JobId, who: str = "") -> str | None:
        """The JSON of the whole request of a job, where its summary is abridged; `who` asks."""
        return await self._readers.look_up(partial(queries.select_spec, job), who)

    async def request(self, job: JobId) -> JobSpec | None:
        """The whole request of a job whose summary is abridged, or None.

        That may take a thread a third of a second: one at a time, and no lookup waits for it.
        """
        text = await self.spec(job)
        if text is None:
            return None
        read = partial(loads, text, bounded=True)
        try:
            return await in_thread(lambda: structure(JobSpec, read()), limiter=self._reading)
        except (InvalidParams, MalformedJSON) as error:
            raise unreadable(
                self._path, f"the request of job {job} cannot be read: {error.message}"
            ) from error

    async def page(self, wanted: Filter, limit: int, who: str = "") -> Page:
        """At most `limit` summaries that fit, newest first, as JSON; see `history.search`.

        `who` asks: the searches of others take turns with theirs.
        """
        return await self._readers.search(partial(find_page, wanted, limit), who)


def _check_files(path: Path) -> None:
    """Raise ConfigError where one of the history's files is none, or may not be written to.

    SQLite itself would say the one by other words, and the other late.
    """
    for end, remedy in _WITHOUT.items():
        file = path.with_name(f"{path.name}{end}")
        try:
            status = file.stat() if not end else file.lstat()
        except FileNotFoundError:
            continue
        if not stat.S_ISREG(status.st_mode):
            kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no file")
            raise ConfigError(f"cannot use the history {path}: {file} is {kind}", remedy=remedy)
        try:
            os.close(os.open(file, os.O_RDWR | os.O_CLOEXEC))  # access(2) sees no append-only file
        except OSError as error:
            if lacks_descriptors(error, None):
                raise
            own = os.geteuid()
            remedies = {
                errno.EACCES: f"chown {own} {file}; chmod u+rw {file}",
                errno.EPERM: f"see lsattr {file}, and let it be written: chattr -i -a {file}",
                errno.EROFS: "mount what it is on for writing",
            }
            raise ConfigError(
                f"cannot use the history {path}: user {own} may not write to {file}: "
                f"{error.strerror}",
                remedy=remedies.get(error.errno or 0, "check the disk that holds it"),
            ) from error


def _keep_orphan(path: Path) -> None:
    """Set aside a write-ahead log whose database is gone, which SQLite would remove."""
    orphan = path.with_name(f"{path.name}-wal")
    with suppress(OSError):
        gone = not path.exists() or path.stat().st_size == 0
        if gone and not HistoryFiles(path).log_is_empty():
            kept = path.with_name(f"{orphan.name}.orphan-{time.time_ns()}")
            orphan.rename(kept)
            log.warning("the history is missing; its write-ahead log is set aside as %s", kept)
