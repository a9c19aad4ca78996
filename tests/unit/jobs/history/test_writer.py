"""The history's writer: one commit for many, and a fault fails alone."""

import threading
from functools import partial
from pathlib import Path

import apsw
import pytest
import trio
import trio.lowlevel
import trio.testing
from attrs import evolve

from jobworker.errors import InternalError
from jobworker.jobs.history import writer as history_writer
from jobworker.jobs.history.history import History
from jobworker.model.job import JobId, JobRecord, JobSpec

from ...strategies import record
from .histories import (
    commits,
    file_size_limit,
    ids_of,
    latest,
    opened,
    path,
    put_three,
    until_waiting,
    write_lock,
)
from .played_writer import Played, played

__all__ = ["commits", "path", "played"]


async def test_writes_of_the_same_moment_share_a_commit(path: Path, commits: list[None]) -> None:
    with opened(path) as history, write_lock(path) as other:
        commits.clear()
        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(history.put, record(history.take_id()))
            await until_waiting(100, nursery)
            other.execute("ROLLBACK")
        # What the writer took before the lock kept it, and all that came meanwhile.
        assert 1 <= len(commits) <= 2
        assert len(await latest(history, limit=1000)) == 100


async def test_put_waits_for_a_backup_that_holds_the_lock(path: Path) -> None:
    with opened(path) as history, write_lock(path) as other:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(history.put, record(history.take_id()))
            await trio.sleep(0.2)  # a put without patience failed after 5 ms
            assert await latest(history, limit=10) == []  # and readers go on
            other.execute("COMMIT")
        assert ids_of(await latest(history, limit=10)) == [1]


async def test_lock_that_is_never_given_back_is_told_to_each_writer(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history_writer, "BUSY_SECONDS", 0.05)
    with opened(path) as history:
        with write_lock(path):
            told = await put_three(history, record)
        assert len(told) == 3
        assert "another program has locked it" in told[0].message
        await history.put(record(history.take_id()))
        assert ids_of(await latest(history, limit=10)) == [4]


async def _put_together(
    history: History, path: Path, stored: list[JobRecord]
) -> dict[int, InternalError]:
    """Put records in as few transactions as can be: the errors, by id."""
    refused: dict[int, InternalError] = {}

    async def put(each: JobRecord) -> None:
        try:
            await history.put(each)
        except InternalError as error:
            refused[each.id] = error

    with write_lock(path) as other, trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            for each in stored:
                nursery.start_soon(put, each)
            await until_waiting(len(stored), nursery)
            other.execute("ROLLBACK")
    return refused


class _Surprise:
    """A value that raises what nobody expects of a record."""

    def astimezone(self, _: object) -> None:
        raise RuntimeError("not a date at all")


async def test_bad_record_fails_alone_and_the_others_of_its_batch_are_stored(path: Path) -> None:
    with opened(path) as history:
        stored = [record(history.take_id()) for _ in range(6)]
        stored[2] = record(stored[2].id, owner="\ud800")
        stored[4] = evolve(stored[4], created_at=_Surprise())  # type: ignore[arg-type]
        refused = await _put_together(history, path, stored)
        assert refused.keys() == {3, 5}
        assert "not a date at all" in refused[5].message
        assert ids_of(await latest(history, limit=10)) == [6, 4, 2, 1]


async def test_record_too_large_for_the_disk_fails_alone(path: Path) -> None:
    with opened(path) as history:
        await history.put(record(history.take_id()))
        stored = [record(history.take_id()) for _ in range(3)]
        stored[1] = record(stored[1].id, spec=JobSpec(command=("x" * 100_000,) * 9))
        with file_size_limit(400_000):
            refused = await _put_together(history, path, stored)
        assert refused.keys() == {3}
        assert ids_of(await latest(history, limit=10)) == [4, 2, 1]


async def test_nobody_waits_for_the_writes_of_those_who_came_later(
    path: Path, commits: list[None]
) -> None:
    """The first put of many was once the one to write all that came while others kept coming."""
    with opened(path) as history:

        async def keep_putting() -> None:
            while True:
                await trio.lowlevel.checkpoint()
                await history.put(record(history.take_id()))

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(keep_putting)
            for _ in range(5):
                before = len(commits)
                await history.put(record(history.take_id()))
                assert len(commits) - before <= 4
            nursery.cancel_scope.cancel()


async def test_searches_do_not_delay_writes(path: Path) -> None:
    with opened(path) as history:
        await history.put(record(history.take_id()))
        entered, leave = threading.Event(), threading.Event()

        def search(connection: apsw.Connection) -> None:
            rows = connection.execute("SELECT id FROM jobs")
            next(rows)  # a read transaction is open
            entered.set()
            leave.wait(30)

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(history._readers.search, search)
            await trio.to_thread.run_sync(entered.wait)
            with trio.fail_after(20):
                await history.put(record(history.take_id()))
                assert await history.get(JobId(2)) is not None
            leave.set()


async def test_writes_one_after_another_each_have_their_commit(
    path: Path, commits: list[None]
) -> None:
    with opened(path) as history:
        commits.clear()
        for _ in range(5):
            await history.put(record(history.take_id()))
        assert len(commits) == 5


async def test_cancelled_put_is_written_all_the_same(path: Path) -> None:
    with opened(path) as history:
        first, second = record(history.take_id()), record(history.take_id())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(history.put, first)
            nursery.start_soon(history.put, second)
            nursery.cancel_scope.cancel()
        assert ids_of(await latest(history, limit=10)) == [2, 1]


async def test_disk_that_refuses_is_told_to_each_writer_and_the_next_may_succeed(
    path: Path,
) -> None:
    with opened(path) as history:
        await history.put(record(history.take_id()))
        with file_size_limit(1):
            told = await put_three(history, lambda id_: record(id_, detail="x" * 100_000))
        assert len(told) == 3
        assert "cannot record job" in told[0].message
        assert "worker.state_dir" in told[0].remedy
        assert ids_of(await latest(history, limit=10)) == [1]
        await history.put(record(history.take_id()))
        assert ids_of(await latest(history, limit=10)) == [5, 1]


async def test_record_that_cannot_be_written_leaves_no_writer_waiting(path: Path) -> None:
    with opened(path) as history:
        assert len(await put_three(history, lambda id_: record(id_, owner="\ud800"))) == 3
        await history.put(record(history.take_id()))
        assert ids_of(await latest(history, limit=10)) == [4]


async def test_fault_of_the_writer_itself_is_told_and_does_not_end_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(path) as history:

        def broken(*_: object) -> None:
            raise ZeroDivisionError

        with monkeypatch.context() as patch:
            patch.setattr(history._writer, "_room", broken)  # has no `ensure`
            told = await put_three(history, record)
        assert len(told) == 3
        await history.put(record(history.take_id()))


# --- over a reserve that is played ------------------------------------------------------------


async def test_fault_of_one_write_leaves_nothing_of_it_and_all_of_the_others(
    played: Played,
) -> None:
    async with played.one_batch() as nursery:
        nursery.start_soon(played.write, "a")
        nursery.start_soon(played.write, "b", ValueError("first"), ValueError("again"))
        nursery.start_soon(played.write, "c")
    assert played.stored() == ["a", "c"]
    assert [str(fault) for fault in played.faults.values()] == ["again"]
    await played.write("d")
    assert played.stored() == ["a", "c", "d"]


async def test_fault_that_was_another_write_s_is_not_told(played: Played) -> None:
    """It is tried again alone."""
    async with played.one_batch() as nursery:
        nursery.start_soon(played.write, "a", ValueError("only together"))
        nursery.start_soon(played.write, "b")
    assert (played.stored(), played.faults) == (["a", "b"], {})


async def test_lock_of_another_program_fails_the_batch_without_more_attempts(
    played: Played,
) -> None:
    """Each further attempt would wait as long again."""
    async with played.one_batch() as nursery:
        for name in ("a", "b", "c"):
            nursery.start_soon(played.write, name, apsw.BusyError("locked"))
    assert (played.stored(), len(played.calls)) == ([], 1)
    assert {type(fault) for fault in played.faults.values()} == {apsw.BusyError}
    assert len(played.faults) == 3


async def test_full_disk_refuses_what_is_new_and_takes_the_rest(played: Played) -> None:
    played.reserve.has_room = False
    async with played.one_batch() as nursery:
        nursery.start_soon(partial(played.write, "end"))
        nursery.start_soon(partial(played.write, "new", is_new=True))
    assert (played.stored(), list(played.faults)) == (["end"], ["new"])
    assert isinstance(played.faults["new"], apsw.FullError)
    assert played.calls == ["end"], "what is new is not even tried"
    played.reserve.has_room = True
    await played.write("newer", is_new=True)
    assert played.stored() == ["end", "newer"]


async def test_ends_alone_share_a_commit_also_without_room(
    played: Played, commits: list[None]
) -> None:
    played.reserve.has_room = False
    async with played.one_batch() as nursery:
        for name in ("a", "b", "c"):
            nursery.start_soon(played.write, name)
    assert (played.stored(), len(played.calls)) == (["a", "b", "c"], 3)
    async with played.one_batch() as nursery:
        nursery.start_soon(played.write, "d", ValueError("once"))
        nursery.start_soon(played.write, "e")
    assert played.calls[3:].count("d") == 2, "the batch was tried as a whole first"


@pytest.mark.parametrize("fault", [apsw.FullError("full"), apsw.IOError("disk I/O error")])
async def test_end_on_a_full_disk_is_tried_again_from_the_beginning_of_the_log(
    played: Played, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    anew = list[str]()
    monkeypatch.setattr(history_writer, "make_log_start_anew", lambda _: anew.append("anew"))
    await played.write("end", fault, fault)  # in the batch, and alone
    assert (played.stored(), anew, played.faults) == (["end"], ["anew"], {})
    await played.write("new", fault, fault, is_new=True)
    assert (played.stored(), anew) == (["end"], ["anew"]), "the log's room is for ends"
    await played.write("bad", ValueError("bad"), ValueError("bad"))
    assert anew == ["anew"], "that is no matter of room"
    assert list(played.faults) == ["new", "bad"]


@pytest.mark.parametrize("fault", [apsw.IOError("disk I/O error"), OSError("no such device")])
async def test_reserve_that_cannot_be_looked_at_keeps_nothing_from_the_disk(
    played: Played, fault: Exception
) -> None:
    played.reserve.fault = fault
    await played.write("new", is_new=True)
    assert (played.stored(), played.faults) == (["new"], {})


async def test_reserve_that_another_program_has_locked_fails_the_batch(played: Played) -> None:
    played.reserve.fault = apsw.BusyError("locked")
    await played.write("a")
    assert (played.calls, type(played.faults["a"])) == ([], apsw.BusyError)


async def test_close_writes_what_waits_and_ends_the_thread(played: Played) -> None:
    async with played.one_batch() as nursery:
        for name in ("a", "b"):
            nursery.start_soon(played.write, name)
    await trio.to_thread.run_sync(played.writer.close)
    assert not played.writer._thread.is_alive()
    assert played.stored() == ["a", "b"]


def test_caller_whose_event_loop_has_ended_is_told_nothing() -> None:
    made = list[history_writer._Write]()

    async def make() -> None:
        made.append(history_writer._Write(lambda _: None))

    trio.run(make)
    made[0].finish(None)
    assert not made[0].done.is_set()
