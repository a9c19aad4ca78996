"""The users of a spool: its files are open as long as there are any."""

import os
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import trio
import trio.testing
from attrs import define

from jobworker.errors import FollowerStalled
from jobworker.jobs.output.files import OutputFiles
from jobworker.jobs.output.search import Start
from jobworker.jobs.output.spool import Spool
from jobworker.jobs.output.spool_users import SpoolUsers

from .written_logs import (
    OUT,
    append,
    everything,
    joined,
    no_descriptor_leaks,
    open_fds,
    read_all,
)

__all__ = ["no_descriptor_leaks"]


async def test_files_close_with_the_last_user(tmp_path: Path) -> None:
    before = open_fds()
    spool = Spool.create(tmp_path / "job")
    append(spool, OUT, b"text")
    await spool.seal()
    follower = spool.follow()
    spool.close()
    with pytest.raises(trio.ClosedResourceError):
        spool.follow()
    inside = set(open_fds().values()) - set(before.values())
    assert {os.path.basename(path) for path in inside} >= {"stdout", "stderr", "index"}
    assert joined(await everything(follower)) == b"text"
    follower.close()
    left = set(open_fds().values()) - set(before.values())
    assert not [path for path in left if str(tmp_path) in path]


async def test_files_stay_open_while_a_thread_uses_them(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path / "job")
    go_on = threading.Event()

    def work() -> None:
        assert go_on.wait(60)
        append(spool, OUT, b"in time")  # raises where the descriptors are gone

    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(spool.write, work)
            await trio.testing.wait_all_tasks_blocked()
            spool.close()
            scope.cancel()  # which the thread outlives
            go_on.set()
    files = OutputFiles.open(tmp_path / "job")
    assert joined(read_all(files)) == b"in time"
    files.close()


async def test_follower_whose_files_others_need_is_told_so_and_holds_none(
    tmp_path: Path,
) -> None:
    spool, begun, go_on = Spool.create(tmp_path / "job"), threading.Event(), threading.Event()
    append(spool, OUT, b"x" * 1000)
    await spool.seal()
    closed, last = list[bool](), spool.follow()
    with spool.follow() as behind, spool.follow() as another:
        await behind.receive(1)
        spool.close()
        spool.lend(lambda: closed.append(True))

        def wait() -> None:
            begun.set()
            assert go_on.wait(20)

        async def read() -> None:
            with spool.in_use():  # as for what is not in the page cache
                await trio.to_thread.run_sync(wait)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await trio.to_thread.run_sync(begun.wait)
            spool.shut_out()
            last.close()
            assert not closed, "a thread reads"
            go_on.set()
        assert (closed, spool.has_files) == ([True], False)
        for each in (behind, another):
            with pytest.raises(FollowerStalled, match="follow again from the offset"):
                await each.receive()
        with pytest.raises(FollowerStalled):
            spool.follow()
        with pytest.raises(FollowerStalled):
            await spool.find_start(Start(tail_lines=1))
        assert behind.offset == 1
    assert closed == [True]


# --- the count --------------------------------------------------------------------------------


@define(eq=False)
class Files:
    """Counts how often it was closed."""

    closed: int = 0

    def let_go(self) -> list[int]:
        self.closed += 1
        return []


@pytest.fixture
def files() -> Files:
    return Files()


@pytest.fixture
def users(files: Files) -> SpoolUsers:
    return SpoolUsers(files)  # type: ignore[arg-type]


def test_owner_alone_closes_the_files_once(users: SpoolUsers, files: Files) -> None:
    assert users.any
    users.close()
    users.close()
    assert (users.closed, users.any, files.closed) == (True, False, 1)


def test_files_stay_open_for_each_follower_and_each_call(users: SpoolUsers, files: Files) -> None:
    users.add_follower()
    with suppress(ZeroDivisionError), users.in_use():
        users.close()
        users.close()
        users.remove_follower()
        assert (users.followers, files.closed) == (0, 0)
        raise ZeroDivisionError
    assert files.closed == 1, "also after a fault"


def test_lent_spool_closes_itself_after_its_last_user_and_says_so_once(
    users: SpoolUsers, files: Files
) -> None:
    told = list[str]()
    users.lend(lambda: told.append("closed"))
    assert files.closed == 0, "nobody has used it yet"
    with users.in_use():
        users.add_follower()
    assert (told, files.closed) == ([], 0)
    users.remove_follower()
    assert (told, files.closed, users.closed) == (["closed"], 1, True)
    users.close()
    assert (told, files.closed) == (["closed"], 1)
    assert users._when_closed is None, "it may refer to the spool"


def test_spool_that_is_not_lent_waits_for_its_owner(users: SpoolUsers, files: Files) -> None:
    users.add_follower()
    users.remove_follower()
    assert (users.any, files.closed) == (True, 0)


def test_lent_spool_whose_owner_has_closed_it_stays_open_for_its_last_user(
    users: SpoolUsers, files: Files
) -> None:
    told = list[str]()
    users.add_follower()
    users.add_follower()
    users.close()
    users.lend(lambda: told.append("closed"))
    users.remove_follower()
    assert (told, files.closed) == ([], 0)
    users.remove_follower()
    assert (told, files.closed) == (["closed"], 1)


def test_followers_that_are_shut_out_count_no_more(users: SpoolUsers, files: Files) -> None:
    told = list[str]()
    users.lend(lambda: told.append("closed"))
    users.add_follower()
    users.add_follower()
    with users.in_use():
        users.shut_out()
        users.remove_follower()
        assert (users.shut, files.closed) == (True, 0), "a thread reads"
    assert (told, files.closed, users.any) == (["closed"], 1, False)
    users.remove_follower()
    assert (users.followers, files.closed) == (0, 1)


def test_spool_that_its_owner_has_closed_is_shut_at_once(users: SpoolUsers, files: Files) -> None:
    users.add_follower()
    users.close()
    users.shut_out()
    assert (files.closed, users.any) == (1, False)
