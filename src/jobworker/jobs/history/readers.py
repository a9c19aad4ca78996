"""The history's readers: connections that only read, each used by one thread at a time.

In WAL mode a reader sees the last commit and waits for no writer, and no writer waits for a reader.
So what clients ask never delays a job's start. The number of threads bounds what all questions
together take of the host. Lookups of one record have threads of their own: searches, which read
more, cannot keep them waiting. One search runs at a time, since Python runs one thread at a time
anyway, and after each the next waits for as long as it took: a flood of searches takes half of a
processor at most, and the event loop has the other half.

SQLite's errors, and records that cannot be decoded, end here: callers get InternalError, or
OutOfDescriptors where it is the process that is at its limit, and not the file that is damaged.
"""

import errno
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar
from weakref import WeakValueDictionary

import apsw
import trio
from attrs import Factory, define

from jobworker.errors import InternalError, InvalidParams, MalformedJSON, OutOfDescriptors
from jobworker.threads import in_thread

T = TypeVar("T")

LOOKUP_THREADS = 2
MAX_REST_SECONDS = 0.1
"""After a search that waited for a slow disk, too."""
_BUSY_SECONDS = 5.0
"""A reader waits only while another process recovers the database after a crash."""
_LIMITS = (errno.EMFILE, errno.ENFILE)
NO_DESCRIPTOR = "the service has no file descriptor left for it"


@define(eq=False)
class Readers:
    """Connections to the database at `path`, opened when they are first needed."""

    _path: Path
    _free: list[apsw.Connection] = Factory(list)
    _lookups: trio.CapacityLimiter = Factory(lambda: trio.CapacityLimiter(LOOKUP_THREADS))
    _turn: trio.StrictFIFOLock = Factory(trio.StrictFIFOLock)
    """Held by the one search that runs."""
    _searching: WeakValueDictionary[str, trio.StrictFIFOLock] = Factory(WeakValueDictionary)
    _looking_up: WeakValueDictionary[str, trio.StrictFIFOLock] = Factory(WeakValueDictionary)
    """By whoever asks, while they do: one question of theirs stands in line with those of others,
    so that nobody waits for another's queue."""
    _rests_until: float = -math.inf

    async def look_up(self, question: Callable[[apsw.Connection], T], who: str = "") -> T:
        """Ask for something that takes a few steps, in a thread.

        Raises InternalError, OutOfDescriptors.
        """
        async with self._looking_up.setdefault(who, trio.StrictFIFOLock()):
            return await in_thread(partial(self._ask, question), limiter=self._lookups)

    async def search(self, question: Callable[[apsw.Connection], T], who: str = "") -> T:
        """Ask for something that takes longer, in a thread, one at a time.

        Raises InternalError, OutOfDescriptors.
        """
        async with self._searching.setdefault(who, trio.StrictFIFOLock()), self._turn:
            await trio.sleep_until(self._rests_until)
            began = trio.current_time()
            try:
                return await in_thread(partial(self._ask, question))
            finally:
                now = trio.current_time()
                self._rests_until = now + min(now - began, MAX_REST_SECONDS)

    def close(self) -> None:
        """Close all connections; no question may be under way."""
        while self._free:
            self._free.pop().close()

    def _ask(self, question: Callable[[apsw.Connection], T]) -> T:
        connection = None
        try:
            connection = self._free.pop() if self._free else self._open()
            try:
                return question(connection)
            finally:
                self._free.append(connection)
        except apsw.Error as error:
            if lacks_descriptors(error, connection):
                raise OutOfDescriptors(
                    f"cannot read the history {self._path}: {NO_DESCRIPTOR}",
                    remedy="try again later, or raise the service's LimitNOFILE",
                ) from error
            raise unreadable(self._path, str(error)) from error
        except (InvalidParams, MalformedJSON) as error:  # a record is damaged, not the question
            why = f"a record of it cannot be read: {error.message}"
            raise unreadable(self._path, why) from error

    def _open(self) -> apsw.Connection:
        connection = apsw.Connection(str(self._path), flags=apsw.SQLITE_OPEN_READONLY)
        connection.set_busy_timeout(int(_BUSY_SECONDS * 1000))
        return connection


def lacks_descriptors(error: BaseException, connection: apsw.Connection | None) -> bool:
    """Whether a file could not be opened for want of a descriptor; at once after `error`."""
    if isinstance(error, OSError):
        return error.errno in _LIMITS
    if not isinstance(error, apsw.CantOpenError):
        return False
    if connection is not None:
        return connection.system_errno in _LIMITS
    try:  # without a connection nothing keeps the number of the error
        os.close(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
    except OSError as refused:
        return refused.errno in _LIMITS
    return False


def unreadable(path: Path, why: str) -> InternalError:
    """The error of a history that is open and cannot be read at some place."""
    return InternalError(
        f"cannot read the history {path}: {why}",
        remedy="check the disk that holds worker.state_dir; if the file is damaged, stop the "
        "service and put a copy back",
    )
