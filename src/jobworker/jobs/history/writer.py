"""The history's writer: one thread that owns the only connection which writes.

Writes that arrive during a transaction share the next one (group commit). A commit waits for the
disk, and a hundred jobs that end together should not wait for it a hundred times. The thread
belongs to no caller, so no caller waits for writes that arrived after its own.

A write is a function that executes statements. If a shared transaction fails, the thread tries each
of its writes again in a transaction of its own. So a bad record, or one that is too large for a
nearly full disk, fails alone. The caller of a write gets the exception that the write raised. No
exception ends the thread, and every caller gets its answer.

Another process may hold the database's write lock for a while (a backup with BEGIN IMMEDIATE, a
checkpoint). The thread waits for it up to BUSY_SECONDS. Then all writes of the batch fail.

If the disk is full, the thread refuses new records. Changes and ends of jobs that exist use the
reserved space (`history.reserved_space`).
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import apsw
import trio
from attrs import Factory, define, field

from jobworker.jobs.history.files import HistoryFiles
from jobworker.jobs.history.reserved_space import ReservedSpace, make_log_start_anew

log = logging.getLogger("jobworker.jobs")

BUSY_SECONDS = 10.0
"""How long a write waits for another process's lock. The last steps of a backup take less."""

Work = Callable[[apsw.Connection], None]
"""Executes the statements of one write. The thread may call it again after a rollback."""


@define(eq=False)
class _Write:
    """One caller's statements on their way to the disk."""

    work: Work
    is_new: bool = False
    """Whether the thread refuses the write to save the reserved space for the ends of jobs."""
    if_refused: Callable[[], None] | None = None
    """Called in the thread if nothing of the write is stored, before its caller wakes."""
    _token: trio.lowlevel.TrioToken = Factory(trio.lowlevel.current_trio_token)
    done: trio.Event = Factory(trio.Event)
    fault: BaseException | None = None

    def finish(self, fault: BaseException | None) -> None:
        """Wake the caller with this fault, or with None. For the writer's thread."""
        self.fault = fault
        if fault is not None and self.if_refused is not None:
            try:
                self.if_refused()
            except Exception:  # the caller must wake
                log.exception("a refused write could not be kept elsewhere")
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self.done.set)


@define(eq=False)
class Writer:
    """The thread and the writes that wait for it."""

    _connection: apsw.Connection
    _room: ReservedSpace
    _files: HistoryFiles
    _waiting: deque[_Write] = field(factory=deque, init=False)
    _arrival: threading.Condition = field(factory=threading.Condition, init=False)
    _closing: bool = field(default=False, init=False)
    _thread: threading.Thread = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._connection.set_busy_timeout(int(BUSY_SECONDS * 1000))
        # A daemon thread: a service that ends by an exception must not wait for a disk that hangs.
        self._thread = threading.Thread(target=self._serve, name="history-writer", daemon=True)
        self._thread.start()

    async def write(
        self, work: Work, *, is_new: bool = False, if_refused: Callable[[], None] | None = None
    ) -> None:
        """Execute `work` in a transaction. Returns once the transaction is on the disk.

        `is_new`: the write gets none of the space that is reserved for the ends of jobs. A
        cancellation does not interrupt it. Raises whatever `work` or the commit raises; then
        nothing of this write is stored, and the thread has called `if_refused`. It does so in the
        order in which the writes came.
        """
        write = _Write(work, is_new, if_refused)
        with self._arrival:
            self._waiting.append(write)
            self._arrival.notify()
        with trio.CancelScope(shield=True):  # the thread answers every write
            await write.done.wait()
        if write.fault is not None:
            raise write.fault

    def close(self) -> None:
        """Write all that waits, end the thread and close the connection. Blocks for the disk."""
        with self._arrival:
            self._closing = True
            self._arrival.notify()
        self._thread.join()
        self._files.close(self._connection)

    # --- in the thread ----------------------------------------------------------------------

    def _serve(self) -> None:
        while batch := self._next_batch():
            faults: list[BaseException | None]
            try:
                faults = self._commit(batch)
            except BaseException as error:  # noqa: BLE001 - without this thread nothing is written
                faults = [error] * len(batch)
            for write, fault in zip(batch, faults, strict=True):
                write.finish(fault)

    def _next_batch(self) -> list[_Write]:
        """Wait for writes and take all of them. An empty list ends the thread."""
        with self._arrival:
            while not (self._waiting or self._closing):
                self._arrival.wait()
            batch = list(self._waiting)
            self._waiting.clear()
        return batch

    def _commit(self, batch: Sequence[_Write]) -> list[BaseException | None]:
        """Commit a batch, as a whole if possible. Returns each write's fault, None if stored."""
        try:
            has_room = self._has_room()
        except apsw.BusyError as busy:
            return [busy] * len(batch)
        if not has_room and any(write.is_new for write in batch):
            return [self._attempt_without_room(write) for write in batch]
        fault = self._attempt(batch)
        if fault is None or isinstance(fault, apsw.BusyError):
            return [fault] * len(batch)
        return [self._attempt_on_full_disk(write) for write in batch]

    def _has_room(self) -> bool:
        try:
            return self._room.ensure(self._connection)
        except apsw.BusyError:
            raise
        except (apsw.Error, OSError):  # each write meets the fault again and raises it
            return True

    def _attempt_without_room(self, write: _Write) -> BaseException | None:
        if write.is_new:
            return apsw.FullError("the disk is full but for what is set aside for jobs' ends")
        return self._attempt_on_full_disk(write)

    def _attempt_on_full_disk(self, write: _Write) -> BaseException | None:
        """Attempt one write. If the log cannot grow, attempt it again from the log's beginning."""
        fault = self._attempt([write])
        if write.is_new or not isinstance(fault, (apsw.FullError, apsw.IOError)):
            return fault
        with suppress(apsw.Error):
            make_log_start_anew(self._connection)
        return self._attempt([write])

    def _attempt(self, batch: Sequence[_Write]) -> BaseException | None:
        try:
            with self._transaction():
                for write in batch:
                    write.work(self._connection)
        except BaseException as fault:  # noqa: BLE001 - the callers wait for it
            return fault
        return None

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:  # on a full disk SQLite may have rolled back itself
                self._connection.execute("ROLLBACK")
            raise
