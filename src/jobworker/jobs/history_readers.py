"""The history's readers: connections that only read, each used by one thread at a time.

In WAL mode a reader sees the last commit and waits for no writer, and no writer waits for a reader.
So what clients ask never delays a job's start. The number of threads bounds what all questions
together take of the host. Lookups of one record have threads of their own: lists, which read more,
cannot keep them waiting.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import apsw
import trio
from attrs import Factory, define

T = TypeVar("T")

LOOKUP_THREADS = 2
LIST_THREADS = 2
_BUSY_SECONDS = 5.0
"""A reader waits only while another process recovers the database after a crash."""


@define(eq=False)
class Readers:
    """Connections to the database at `path`, opened when they are first needed."""

    _path: Path
    _free: list[apsw.Connection] = Factory(list)
    _lookups: trio.CapacityLimiter = Factory(lambda: trio.CapacityLimiter(LOOKUP_THREADS))
    _lists: trio.CapacityLimiter = Factory(lambda: trio.CapacityLimiter(LIST_THREADS))

    async def look_up(self, question: Callable[[apsw.Connection], T]) -> T:
        """Ask for something that takes a few steps, in a thread. Raises apsw.Error."""
        return await trio.to_thread.run_sync(partial(self._ask, question), limiter=self._lookups)

    async def search(self, question: Callable[[apsw.Connection], T]) -> T:
        """Ask for something that takes longer, in a thread. Raises apsw.Error."""
        return await trio.to_thread.run_sync(partial(self._ask, question), limiter=self._lists)

    def close(self) -> None:
        """Close all connections; no question may be under way."""
        while self._free:
            self._free.pop().close()

    def _ask(self, question: Callable[[apsw.Connection], T]) -> T:
        connection = self._free.pop() if self._free else self._open()
        try:
            return question(connection)
        finally:
            self._free.append(connection)

    def _open(self) -> apsw.Connection:
        connection = apsw.Connection(str(self._path), flags=apsw.SQLITE_OPEN_READONLY)
        connection.set_busy_timeout(int(_BUSY_SECONDS * 1000))
        return connection
