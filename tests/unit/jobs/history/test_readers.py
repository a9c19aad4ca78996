"""Questions of one name stand in line behind each other, and not before those of others."""

import threading
from collections.abc import Awaitable, Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from threading import Semaphore

import apsw
import pytest
import trio
import trio.lowlevel
import trio.testing

from jobworker.errors import ConfigError, InternalError, OutOfDescriptors
from jobworker.jobs.history.history import History
from jobworker.jobs.history.readers import Readers
from jobworker.model.job import JobRecord
from jobworker.serialization.convert import structure
from jobworker.serialization.json_text import loads

from ...strategies import record
from ..descriptors import descriptors_left
from .histories import opened, path

__all__ = ["path"]

FLOOD = 50


def ask_by_look_up(readers: Readers) -> Callable[..., Awaitable[object]]:
    return readers.look_up


def ask_by_search(readers: Readers) -> Callable[..., Awaitable[object]]:
    return readers.search


@pytest.mark.parametrize("ask", [ask_by_look_up, ask_by_search])
async def test_nobody_waits_for_the_queue_of_another(
    ask: Callable[[Readers], Callable[..., Awaitable[object]]], tmp_path: Path
) -> None:
    path = tmp_path / "some.db"
    apsw.Connection(str(path)).close()
    allowed, quiet_is_answered = Semaphore(0), trio.Event()

    async def ask_much() -> None:
        await ask(readers)(lambda _: allowed.acquire(timeout=20), "noisy")

    async def ask_once() -> None:
        await ask(readers)(lambda _: None, "quiet")
        quiet_is_answered.set()

    with closing(Readers(path)) as readers:
        async with trio.open_nursery() as nursery:
            for _ in range(FLOOD):
                nursery.start_soon(ask_much)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(ask_once)
            await trio.testing.wait_all_tasks_blocked()
            allowed.release()  # the one under way ends, and no other of theirs
            with trio.move_on_after(10):
                await quiet_is_answered.wait()
            allowed.release(FLOOD)
            assert quiet_is_answered.is_set()


def count_rows(connection: apsw.Connection) -> object:
    return connection.execute("SELECT count(*) FROM filled").get


def read_record(connection: apsw.Connection) -> object:
    return structure(JobRecord, loads(str(connection.execute("SELECT '{}'").get)))


@pytest.mark.parametrize("ask", [ask_by_look_up, ask_by_search])
async def test_error_of_reading_is_named_and_the_next_question_is_answered(
    ask: Callable[[Readers], Callable[..., Awaitable[object]]], tmp_path: Path
) -> None:
    path = tmp_path / "some.db"
    with closing(apsw.Connection(str(path))) as connection:
        connection.execute("CREATE TABLE filled (row); INSERT INTO filled VALUES (zeroblob(99999))")
    whole = path.read_bytes()
    with closing(Readers(path)) as readers:
        path.write_bytes(whole[:4096])  # a disk that has lost the rest
        with pytest.raises(InternalError, match=f"cannot read the history {path}: .*malformed"):
            await ask(readers)(count_rows)
        path.write_bytes(whole)
        with pytest.raises(InternalError, match=r"a record of it cannot be read: .*owner"):
            await ask(readers)(read_record)
        assert await ask(readers)(lambda connection: connection.execute("SELECT 7").get) == 7


async def test_want_of_descriptors_is_told_as_that_and_keeps_nobody_from_writing(
    tmp_path: Path,
) -> None:
    path, written = tmp_path / "history.db", record(1)
    for count in (0, 1):  # of the two that a new connection needs
        with closing(History.open(path)) as history:
            await history.put(written)
            with descriptors_left(count):
                for ask in (history.summary, history.get, history.spec):
                    with pytest.raises(OutOfDescriptors, match="no file descriptor left"):
                        await ask(written.id)
                with pytest.raises(OutOfDescriptors):
                    await history.with_output()
                await history.mark_output_removed([written.id], datetime.now(UTC))
                await history.put(written)
            assert await history.summary(written.id) == written
    for count in range(4):
        with descriptors_left(count), pytest.raises(ConfigError, match="descriptor left") as told:
            History.open(path)
        assert "LimitNOFILE" in told.value.remedy
    with closing(History.open(path)) as history:
        assert await history.summary(written.id) == written


async def test_want_of_descriptors_that_has_passed_meanwhile_is_told_as_that(
    tmp_path: Path,
) -> None:
    path = tmp_path / "some.db"
    with closing(apsw.Connection(str(path))) as connection:
        connection.execute("PRAGMA journal_mode = wal; CREATE TABLE filled (row)").fetchall()

    def read_in_want(connection: apsw.Connection) -> object:
        with descriptors_left(0):
            return count_rows(connection)

    with closing(Readers(path)) as readers:
        with pytest.raises(OutOfDescriptors):
            await readers.look_up(read_in_want)
        assert await readers.look_up(count_rows) == 0


async def test_nobody_waits_for_the_queue_of_another_ones_searches(path: Path) -> None:
    with opened(path) as history:
        order: list[str] = []
        leave = threading.Event()

        async def ask(who: str) -> None:
            await history._readers.search(lambda _: leave.wait(30), who)
            order.append(who)

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(ask, "flood")
            await trio.sleep(0.05)
            nursery.start_soon(ask, "quiet")
            await trio.sleep(0.05)
            leave.set()
        assert order.index("quiet") <= 2
