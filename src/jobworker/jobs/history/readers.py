"""The history's readers: connections that only read, each used by one thread at a time.

In WAL mode a reader sees the last commit and waits for no writer, and no writer waits for a reader.
So the queries of clients never delay a job's start. The number of threads bounds what all queries
together take of the host. Lookups of one record have threads of their own, so they do not wait for
searches, which read more. One search runs at a time, since Python runs one thread at a time anyway.
After a search the next one waits for as long as the search took. So a flood of searches takes half
of a processor at most, and leaves the other half to the event loop.

This module maps the errors of SQLite and of records that cannot be decoded. Callers get
OutOfDescriptors if the process has too many files open, else InternalError.
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
"""The longest wait after a search. A search may also be slow because it waited for the disk."""
_BUSY_SECONDS = 5.0
"""How long a query waits for a lock. A reader meets one only while another process recovers the
database after a crash."""
_LIMITS = (errno.EMFILE, errno.ENFILE)
NO_DESCRIPTOR = "the service has no file descriptor left for it"


@define(eq=False)
class Readers:
    """The connections to the database at `path`; each is opened when it is first needed."""

    _path: Path
    _free: list[apsw.Connection] = Factory(list)
    _lookups: trio.CapacityLimiter = Factory(lambda: trio.CapacityLimiter(LOOKUP_THREADS))
    _turn: trio.StrictFIFOLock = Factory(trio.StrictFIFOLock)
    """Held by the search that runs, and by the next one during its rest."""
    _searching: WeakValueDictionary[str, trio.StrictFIFOLock] = Factory(WeakValueDictionary)
    _looking_up: WeakValueDictionary[str, trio.StrictFIFOLock] = Factory(WeakValueDictionary)
    """Locks by the client's name. One query of each name at a time waits among those of other
    names, so a client does not wait for the queue of another one."""
    _rests_until: float = -math.inf

    async def look_up(self, query: Callable[[apsw.Connection], T], who: str = "") -> T:
        """Run a query of a few steps in a thread and return its result.

        `who`: the name of the client that asks. Raises InternalError, OutOfDescriptors.
        """
        async with self._looking_up.setdefault(who, trio.StrictFIFOLock()):
            return await in_thread(partial(self._run, query), limiter=self._lookups)

    async def search(self, query: Callable[[apsw.Connection], T], who: str = "") -> T:
        """Run a query that may take long in a thread and return its result. One runs at a time.

        `who`: the name of the client that asks. Raises InternalError, OutOfDescriptors.
        """
        async with self._searching.setdefault(who, trio.StrictFIFOLock()), self._turn:
            await trio.sleep_until(self._rests_until)
            began = trio.current_time()
            try:
                return await in_thread(partial(self._run, query))
            finally:
                now = trio.current_time()
                self._rests_until = now + min(now - began, MAX_REST_SECONDS)

    def close(self) -> None:
        """Close all connections. No query may be under way."""
        while self._free:
            self._free.pop().close()

    def _run(self, query: Callable[[apsw.Connection], T]) -> T:
        connection = None
        try:
            connection = self._free.pop() if self._free else self._open()
            try:
                return query(connection)
            finally:
                self._free.append(connection)
        except apsw.Error as error:
            if lacks_descriptors(error, connection):
                raise OutOfDescriptors(
                    f"cannot read the history {self._path}: {NO_DESCRIPTOR}",
                    remedy="try again later, or raise the service's LimitNOFILE",
                ) from error
            raise unreadable(self._path, str(error)) from error
        except (InvalidParams, MalformedJSON) as error:  # they blame the client; the record is bad
            why = f"a record of it cannot be read: {error.message}"
            raise unreadable(self._path, why) from error

    def _open(self) -> apsw.Connection:
        connection = apsw.Connection(str(self._path), flags=apsw.SQLITE_OPEN_READONLY)
        connection.set_busy_timeout(int(_BUSY_SECONDS * 1000))
        return connection


def lacks_descriptors(error: BaseException, connection: apsw.Connection | None) -> bool:
    """Whether `error` arose since the process or the host has no file descriptor left.

    To be called at once after the error: the connection keeps the errno of its last one only.
    """
    if isinstance(error, OSError):
        return error.errno in _LIMITS
    if not isinstance(error, apsw.CantOpenError):
        return False
    if connection is not None:
        return connection.system_errno in _LIMITS
    try:  # SQLite told no errno, as there is no connection: see whether opening a file fails too
        os.close(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
    except OSError as refused:
        return refused.errno in _LIMITS
    return False


def unreadable(path: Path, why: str) -> InternalError:
    """The error for a history that is open, but of which some part cannot be read."""
    return InternalError(
        f"cannot read the history {path}: {why}",
        remedy="check the disk that holds worker.state_dir; if the file is damaged, stop the "
        "service and put a copy back",
    )
