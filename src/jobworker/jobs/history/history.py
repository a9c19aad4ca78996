"""The history: every job's record in SQLite, on the disk before the service tells a client of it.

One connection writes, in a thread of its own (`history.writer`). A few others read
(`history.readers`), so no search delays a job's start or end. A row holds the summary of a record
(`model.summary`), which is enough for most queries. Another table holds the requests that a summary
abridges; each is written once. Labels and names have an index (`history.search`).

What must hold: an id is given once, also across crashes. SQLite's AUTOINCREMENT keeps the last id,
and `last_id` keeps it in case the history is lost. A record is committed before its id leaves the
service. `jobs.takeover` handles the records that an earlier service left unfinished.

SQLite comes from apsw. The SQLite of Python's standard library may be old enough to have the
WAL-reset fault (fixed in 3.51.3).
"""

import errno
import logging
import os
import stat
import time
from collections.abc import Callable, Collection, Mapping, Sequence
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
"""The remedy if the history, or a file that SQLite keeps beside it, is no regular file; by the
ending of its name."""
_KINDS = {stat.S_IFDIR: "a directory", stat.S_IFLNK: "a link", stat.S_IFIFO: "a FIFO"}


@define(eq=False)
class History:
    """The records of all jobs, by id."""

    _writer: Writer
    _readers: Readers
    _path: Path
    _next_id: int
    _last_id: LastId
    _spools: Path | None = None
    _reading: trio.CapacityLimiter = Factory(lambda: trio.CapacityLimiter(1))
    _notes: trio.CapacityLimiter = Factory(lambda: trio.CapacityLimiter(1))
    """Admits one thread that writes a note outside of the writer's."""
    unfinished: tuple[JobRecord, ...] = ()
    """Jobs that an earlier service left waiting or alive, as they were when the history was opened,
    each without the bulk of its request (`without_bulk`)."""
    _never: set[JobId] = Factory(set)
    """Ids that are never given, since the spool directory has something of that name that belongs
    to no job."""

    @classmethod
    def open(cls, path: Path, spools: Path | None = None) -> "History":
        """Open the history at `path`, or create it.

        `spools`: the directory of jobs' output, where each job's note stands too. Raises
        ConfigError if the file cannot be used. Blocks: call it before Trio runs.
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
                    connection.pragma("user_version")  # the first read opens the log and the index
                migrate(connection, path)
                connection.pragma("journal_mode", "wal")
                connection.pragma("synchronous", "full")
                last = connection.execute("SELECT seq FROM sqlite_sequence WHERE name='jobs'").get
                unfinished = queries.select_unfinished(connection)
                room = ReservedSpace(path)
                room.ensure(connection)  # nothing before this changes a file of today's version
                connection.execute("BEGIN IMMEDIATE")  # raises if another program has locked it
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
                "the history ends at job %d, but ids up to %d were given: either those jobs were "
                "refused, or the history is an older copy",
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
        """Write the records that wait and close the file. No call may be under way. Blocks."""
        self._readers.close()
        self._writer.close()
        self._last_id.close()

    def take_id(self) -> JobId:
        """The next id, never given before. Call `keep_id` before a client gets it.

        Raises InternalError if no id is left: the highest is `MAX_JOB`.
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
        """Store that this id was given, in case the history is lost.

        Blocks for the disk. May be called from any thread.
        """
        self._last_id.write(job)

    def never_give(self, job: JobId) -> None:
        """Never give the id `job`: the spool directory has something of that name."""
        self._never.add(job)

    def pass_over(self, job: JobId) -> None:
        """Never give `job` or a lower id: an earlier service may have given it to a client."""
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
        """Store a new or changed record. Returns once it is on the disk.

        `is_new`: the job is only just being admitted. Such a record is refused if the disk has no
        space left but the space that is reserved for the ends of jobs (`reserved_space`).

        A cancellation does not interrupt a write that has begun. Raises InternalError if the disk
        refuses, or if another program has locked the database; then only the job's note has the
        record.
        """
        work, if_refused = partial(queries.put, record, self._spools), None
        if self._spools is not None:  # `work` writes the note too, but may not have begun
            if_refused = partial(write_note, self._spools, record)
        what = f"cannot record job {record.id} in the history"
        await self._write(work, what, is_new=is_new, if_refused=if_refused)

    async def keep_note(self, record: JobRecord) -> None:
        """Write the present state of `record` to the job's note alone. Raises nothing."""
        if self._spools is not None:
            with trio.CancelScope(shield=True):  # waits only for the disk
                await in_thread(write_note, self._spools, record, limiter=self._notes)

    async def _write(
        self,
        work: Work,
        what: str,
        *,
        is_new: bool = False,
        if_refused: Callable[[], None] | None = None,
    ) -> None:
        """Have the writer execute `work`. Raises an InternalError that begins with `what`."""
        try:
            await self._writer.write(work, is_new=is_new, if_refused=if_refused)
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
        """Record for these ended jobs when their output was removed, in one transaction.

        A record that has such a time already stays as it is. Jobs without a record are ignored.
        Raises InternalError if the disk refuses.
        """
        what = "cannot record in the history that output was removed"
        await self._write(partial(queries.mark_output_removed, jobs, when), what)

    async def with_output(self) -> Mapping[JobId, str]:
        """The ended jobs whose records do not say that their output was removed, with owners.

        Raises InternalError, OutOfDescriptors.
        """
        return await self._readers.search(queries.select_with_output)

    async def remove(self, job: JobId) -> None:
        """Delete a job's record. Its id is not given again. A job without a record is ignored.

        Raises InternalError if the disk refuses.
        """
        await self._write(partial(queries.delete, job), f"cannot remove job {job} from the history")

    async def mark_output_missing(self, job: JobId) -> None:
        """Store that the output of a job was missing when the service was about to remove the job.

        Nothing is stored if there is no record, or if the record says that the output was removed.
        Raises InternalError if the disk refuses.
        """
        what = f"cannot remove job {job} from the history"
        await self._write(partial(queries.mark_output_missing, job), what)

    async def removed_without_output(self, jobs: Collection[JobId]) -> frozenset[JobId]:
        """Those of `jobs` that were removed while their output was missing.

        Raises InternalError, OutOfDescriptors.
        """
        return await self._readers.search(partial(queries.select_removed, jobs))

    async def add_audit_rows(self, rows: Sequence[AuditRow]) -> None:
        """Add rows to the audit log: to its table, then to its file.

        Raises InternalError if SQLite refuses; then neither has any of the rows. A row that cannot
        be stored for another reason is lost, and the service's log shows it. If only the file
        cannot take the rows, the service's log says so.
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
            else:  # the fault is in the row, so another attempt would fail too
                log.error("%s: its row is lost: %s", error, rows)
            return
        try:
            await in_thread(append_lines, self._path.with_name(FILE), rows)
        except OSError as error:
            log.error("%d rows are in `worker audit` and not in %s: %s", len(rows), FILE, error)

    async def known(self, jobs: Collection[JobId]) -> frozenset[JobId]:
        """Those of `jobs` that have a record. Raises InternalError, OutOfDescriptors."""
        return await self._readers.search(partial(queries.select_known, jobs))

    async def get(self, job: JobId) -> JobRecord | None:
        """The whole record of one job, as `put` stored it, or None.

        Raises InternalError, OutOfDescriptors.
        """
        return await self._readers.look_up(partial(queries.select_whole, job))

    async def summary(self, job: JobId, who: str = "") -> JobRecord | None:
        """The summary of one job's record (`model.summary`), or None.

        `who`: the name of the client that asks. Raises InternalError, OutOfDescriptors.
        """
        return await self._readers.look_up(partial(queries.select_summary, job), who)

    async def spec(self, job: JobId, who: str = "") -> str | None:
        """The whole request of a job as JSON if its summary is abridged, else None.

        `who`: the name of the client that asks. Raises InternalError, OutOfDescriptors.
        """
        return await self._readers.look_up(partial(queries.select_spec, job), who)

    async def request(self, job: JobId) -> JobSpec | None:
        """The whole request of a job if its summary is abridged, else None.

        Decoding it may take a thread a third of a second. One request is decoded at a time, in a
        thread that no lookup waits for. Raises InternalError, OutOfDescriptors.
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

        `who`: the name of the client that asks. Searches of different names take turns. Raises
        InternalError, OutOfDescriptors.
        """
        return await self._readers.search(partial(find_page, wanted, limit), who)


def _check_files(path: Path) -> None:
    """Raise ConfigError if one of the history's files is no regular file or is not writable.

    SQLite would not name the cause of the first, and would notice the second only at a write.
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
    """Rename a write-ahead log whose database is gone: SQLite would delete it."""
    orphan = path.with_name(f"{path.name}-wal")
    with suppress(OSError):
        gone = not path.exists() or path.stat().st_size == 0
        if gone and not HistoryFiles(path).log_is_empty():
            kept = path.with_name(f"{orphan.name}.orphan-{time.time_ns()}")
            orphan.rename(kept)
            log.warning("the history is missing; its write-ahead log is set aside as %s", kept)
