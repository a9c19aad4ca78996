"""A writer over a table of its own, and a reserve that says what the test wants."""

import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import apsw
import pytest
import trio
import trio.lowlevel
import trio.testing
from attrs import Factory, define

from jobworker.jobs.history.writer import Writer


@define(eq=False)
class Reserve:
    """Says whether there is room, or raises."""

    has_room: bool = True
    fault: Exception | None = None

    def ensure(self, _: apsw.Connection) -> bool:
        if self.fault is not None:
            raise self.fault
        return self.has_room


@define(eq=False)
class Files:
    """Closes the connection."""

    def close(self, connection: apsw.Connection) -> None:
        connection.close()


@define(eq=False)
class Played:
    """A writer over a table of its own, and what was stored in it."""

    path: Path
    reserve: Reserve
    writer: Writer
    calls: list[str] = Factory(list)
    faults: dict[str, BaseException] = Factory(dict)

    def work(self, name: str, *faults: BaseException) -> Callable[[apsw.Connection], None]:
        """Store `name`, after raising each of `faults` at one call."""
        left = list(faults)

        def work(connection: apsw.Connection) -> None:
            self.calls.append(name)
            connection.execute("INSERT INTO stored VALUES (?)", (name,))
            if left:
                raise left.pop(0)

        return work

    async def write(self, name: str, *faults: BaseException, is_new: bool = False) -> None:
        try:
            await self.writer.write(self.work(name, *faults), is_new=is_new)
        except Exception as fault:  # noqa: BLE001 - the tests look at it
            self.faults[name] = fault

    @asynccontextmanager
    async def one_batch(self) -> AsyncIterator[trio.Nursery]:
        """Have all that is written in the nursery wait for the same turn of the thread."""
        begun, go_on = threading.Event(), threading.Event()

        def hold(_: apsw.Connection) -> None:
            begun.set()
            assert go_on.wait(20)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.writer.write, hold)
            assert await trio.to_thread.run_sync(begun.wait, 20)
            yield nursery
            await trio.testing.wait_all_tasks_blocked()
            go_on.set()

    def stored(self) -> list[str]:
        with closing(apsw.Connection(str(self.path))) as connection:
            rows = connection.execute("SELECT name FROM stored ORDER BY name")
            return [str(name) for (name,) in rows]


@pytest.fixture
def played(path: Path) -> Iterator[Played]:
    connection, reserve = apsw.Connection(str(path)), Reserve()
    connection.execute("CREATE TABLE stored (name TEXT)")
    connection.pragma("synchronous", "off")
    writer = Writer(connection, reserve, Files())  # type: ignore[arg-type]
    yield Played(path, reserve, writer)
    if writer._thread.is_alive():
        writer.close()
