"""The history's writer: one thread that owns the one connection which writes.

Writes that arrive while a transaction is under way share the next one (group commit): a commit
waits for the disk, and a hundred jobs that end together should not wait a hundred times. The
thread belongs to no caller, so no caller waits for the writes of those who came after it.

A write is a function that executes statements. Where a shared transaction fails, each of its writes
is tried again in a transaction of its own, so that one bad record, or one that is too large for
what is left of the disk, fails alone. Whatever a write raises goes to its caller; nothing of that
ends the thread, and every caller gets its answer.

Another process may hold the database's write lock for a while (a backup with BEGIN IMMEDIATE, a
checkpoint): the thread waits up to BUSY_SECONDS for it, and then all writes of the batch fail.

Where the disk is full, what is new is refused, and what must be told of jobs that there are takes
the room that was set aside for it (`history.room`).
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import apsw
import trio
from attrs import Factory, define, field

from jobworker.jobs.history.files import HistoryFiles
from jobworker.jobs.history.reserved_space import ReservedSpace, make_log_start_anew

BUSY_SECONDS = 10.0
"""How long a write waits for another process's lock: longer than a backup's last steps take."""

Work = Callable[[apsw.Connection], None]
"""Executes the statements of one write; it may be called twice, the first time rolled back."""


@define(eq=False)
class _Write:
    """One caller's statements on their way to the disk."""

    work: Work
    is_new: bool = False
    """Whether it may be refused in favour of the ends of jobs that there are."""
    _token: trio.lowlevel.TrioToken = Factory(trio.lowlevel.current_trio_token)
    done: trio.Event = Factory(trio.Event)
    fault: BaseException | None = None

    def finish(self, fault: BaseException | None) -> None:
        """Wake the caller: for the writer's thread."""
        self.fault = fault
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self.done.set)


@define(eq=False)
class Writer:
    """The thread, and the writes that wait for it."""

    _connection: apsw.Connection
    _room: ReservedSpace
    _files: HistoryFiles
    _waiting: deque[_Write] = field(factory=deque, init=False)
    _arrival: threading.Condition = field(factory=threading.Condition, init=False)
    _closing: bool = field(default=False, init=False)
    _thread: threading.Thread = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._connection.set_busy_timeout(int(BUSY_SECONDS * 1000))
        # A daemon: a service that ends by an exception must not wait for a disk that hangs.
        self._thread = threading.Thread(target=self._serve, name="history-writer", daemon=True)
        self._thread.start()

    async def write(self, work: Work, *, is_new: bool = False) -> None:
        """Execute `work` in a transaction; returns once that is on the disk.

        What `is_new` gets none of the room that is set aside for ends.

        Not cancelled half-way: what was handed over is written. Raises what `work` or the commit
        raised; nothing of this write is stored then.
        """
        write = _Write(work, is_new)
        with self._arrival:
            self._waiting.append(write)
            self._arrival.notify()
        with trio.CancelScope(shield=True):  # the thread answers every write
            await write.done.wait()
        if write.fault is not None:
            raise write.fault

    def close(self) -> None:
        """Write what waits, end the thread and close the connection. Blocks for the disk."""
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
            except BaseException as error:  # noqa: BLE001 - nobody would write after this thread
                faults = [error] * len(batch)
            for write, fault in zip(batch, faults, strict=True):
                write.finish(fault)

    def _next_batch(self) -> list[_Write]:
        """Wait for writes and take all of them; an empty list says that there will be none."""
        with self._arrival:
            while not (self._waiting or self._closing):
                self._arrival.wait()
            batch = list(self._waiting)
            self._waiting.clear()
        return batch

    def _commit(self, batch: Sequence[_Write]) -> list[BaseException | None]:
        """Commit a batch, as a whole if possible: the fault of each write, None where it stands."""
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
        except (apsw.Error, OSError):  # each write will meet it again
            return True

    def _attempt_without_room(self, write: _Write) -> BaseException | None:
        if write.is_new:
            return apsw.FullError("the disk is full but for what is set aside for jobs' ends")
        return self._attempt_on_full_disk(write)

    def _attempt_on_full_disk(self, write: _Write) -> BaseException | None:
        """Attempt one write; where the log can grow no more, from its beginning again."""
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
        except BaseException as fault:  # noqa: BLE001 - it is the callers', who wait for an answer
            return fault
        return None

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:  # SQLite itself rolls back where the disk is full
                self._connection.execute("ROLLBACK")
            raise
