"""Histories that tests open, fill and hold up."""

import resource
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import apsw
import pytest
import trio
import trio.lowlevel
import trio.testing

from jobworker.errors import ConfigError, InternalError
from jobworker.jobs.history.history import History
from jobworker.jobs.history.search import Filter
from jobworker.model.job import JobRecord
from jobworker.serialization.convert import structure
from jobworker.serialization.json_text import loads

NOW = datetime(2026, 2, 1, 9, 30, tzinfo=UTC)


@contextmanager
def opened(path: Path) -> Iterator[History]:
    history = History.open(path)
    try:
        yield history
    finally:
        history.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "history.db"


@pytest.fixture
def commits() -> Iterator[list[None]]:
    """One entry for each transaction that any connection commits."""
    seen: list[None] = []

    def count() -> bool:
        seen.append(None)
        return False

    def hook(connection: apsw.Connection) -> None:
        connection.set_commit_hook(count)

    apsw.connection_hooks.append(hook)
    yield seen
    apsw.connection_hooks.remove(hook)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """A disk that refuses: no file grows beyond `size` (EFBIG, setrlimit(2))."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def latest(history: History, *, limit: int, **wanted: object) -> list[JobRecord]:
    """A page of the history, as records."""
    page = await history.page(Filter(**wanted), limit)  # type: ignore[arg-type]
    return [structure(JobRecord, loads(text)) for _, text in page.records]


def ids_of(found: list[JobRecord]) -> list[int]:
    return [each.id for each in found]


@contextmanager
def write_lock(path: Path) -> Iterator[apsw.Connection]:
    """Hold the database's write lock, as a backup by another program does."""
    with closing(apsw.Connection(str(path))) as other:
        other.execute("BEGIN IMMEDIATE")
        yield other
        if other.in_transaction:
            other.execute("ROLLBACK")


async def until_waiting(count: int, nursery: trio.Nursery) -> None:
    """Wait until all of a nursery's tasks wait for the disk."""
    while len(nursery.child_tasks) < count:
        await trio.lowlevel.checkpoint()
    await trio.testing.wait_all_tasks_blocked()


async def _put_refused(history: History, stored: JobRecord, told: list[InternalError]) -> None:
    try:
        await history.put(stored)
    except InternalError as error:
        told.append(error)


async def put_three(history: History, make: Callable[[int], JobRecord]) -> list[InternalError]:
    told: list[InternalError] = []
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(_put_refused, history, make(history.take_id()), told)
    return told


def refused(path: Path) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        History.open(path)
    assert str(path) in caught.value.message
    return caught.value
