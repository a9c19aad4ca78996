"""A follower: it reads a log at its own pace, and is woken when there is more."""

from collections.abc import Callable

import pytest
import trio
import trio.lowlevel
import trio.testing
from attrs import Factory, define

from jobworker.errors import InvalidParams, OutputError
from jobworker.jobs.output.follower import Follower
from jobworker.jobs.output.index import LineStart, LogChunk, Place, ReadFilter
from jobworker.jobs.output.search import StartPlace
from jobworker.jobs.output.spool import Spool
from jobworker.model.job import Stream

from .written_logs import ERR, OUT, append, everything, joined, no_descriptor_leaks, spool

__all__ = ["no_descriptor_leaks", "spool"]


async def test_idle_follower_is_woken_and_busy_one_is_not_poked(spool: Spool) -> None:
    got: list[bytes] = []

    async def follow(follower: Follower) -> None:
        got.extend([bytes(chunk.data) async for chunk in follower])

    with spool.follow() as follower, spool.follow() as stalled:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(follow, follower)
            await trio.testing.wait_all_tasks_blocked()
            assert spool.statistics().idle_followers == 1
            await spool.write(lambda: append(spool, OUT, b"now"))
            await trio.testing.wait_all_tasks_blocked()
            assert follower.offset == 3
            await spool.seal()
        assert got == [b"now"]
        assert spool.statistics().idle_followers == 0
        assert stalled.offset == 0
        assert joined(await everything(stalled)) == b"now"


async def test_cancelled_receive_loses_nothing_and_is_forgotten(spool: Spool) -> None:
    with spool.follow() as follower:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(follower.receive)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert spool.statistics().idle_followers == 0
        append(spool, OUT, b"after")
        spool.wake()
        with trio.CancelScope() as scope:
            scope.cancel()
            await follower.receive()
        assert scope.cancelled_caught
        chunk = await follower.receive()
        assert chunk is not None
        assert chunk.data == b"after"
    assert spool.statistics().followers == 0


async def test_closing_a_follower_ends_its_wait(spool: Spool) -> None:
    follower = spool.follow()

    async def wait() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await follower.receive()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        follower.close()
        follower.close()
        statistics = spool.statistics()
        assert (statistics.followers, statistics.idle_followers) == (0, 0)
        spool.wake()  # before the waiting task could run: it must not poke the closed one


async def test_second_task_at_a_follower_is_refused(spool: Spool) -> None:
    with spool.follow() as follower:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(follower.receive)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await follower.receive()
            nursery.cancel_scope.cancel()


# --- over a log in memory ---------------------------------------------------------------------


@define(eq=False)
class MemoryLog:
    """Pieces of both streams, in order. A place is a merged offset."""

    pieces: list[tuple[Stream, bytes]] = Factory(list)
    sealed: bool = False
    skips: dict[int, int | None] = Factory(dict)
    """How many bytes of the chunk at an offset belong to a line that began before it."""
    found: list[int] = Factory(list)
    waiting: list[Follower] = Factory(list)
    forgotten: list[Follower] = Factory(list)
    while_reading: Callable[[], None] = lambda: None

    @property
    def size(self) -> int:
        return sum(len(data) for _, data in self.pieces)

    def check_offset(self, offset: int) -> None:
        if offset > self.size:
            raise InvalidParams("the log is shorter")

    def check_whole(self) -> None:
        raise OutputError("bytes are missing")

    async def find(self, offset: int) -> Place:
        await trio.lowlevel.checkpoint()
        self.found.append(offset)
        return Place(skip=offset)

    async def read(self, place: Place, view: ReadFilter) -> tuple[LogChunk | None, Place]:
        await trio.lowlevel.checkpoint()
        self.while_reading()
        begin = 0
        for stream, data in self.pieces:
            if place.offset < begin + len(data):
                part = data[place.offset - begin :][: view.max_bytes]
                after = Place(skip=place.offset + len(part))
                if stream not in view.streams:
                    return None, after
                return LogChunk(stream=stream, offset=place.offset, time_ns=1, data=part), after
            begin += len(data)
        raise AssertionError("nothing is there")

    async def bytes_before_line(self, chunk: LogChunk) -> int | None:
        await trio.lowlevel.checkpoint()
        return self.skips.get(chunk.offset, 0)

    def await_poke(self, follower: Follower) -> None:
        self.waiting.append(follower)

    def cancel_poke(self, follower: Follower) -> None:
        if follower in self.waiting:
            self.waiting.remove(follower)

    def forget(self, follower: Follower) -> None:
        self.forgotten.append(follower)


def following(log: MemoryLog, start: int = 0, **view: object) -> Follower:
    channel = trio.open_memory_channel[None](1)
    return Follower(log, ReadFilter(**view), start, *channel)  # type: ignore[arg-type]


async def rest_of(follower: Follower, max_bytes: int = 100) -> list[bytes]:
    got = list[bytes]()
    while (chunk := await follower.receive(max_bytes, wait=False)) is not None:
        got.append(bytes(chunk.data))
    return got


async def test_place_is_looked_up_once() -> None:
    log = MemoryLog([(OUT, b"abcdef")])
    with following(log, 2) as follower:
        assert await rest_of(follower, 2) == [b"cd", b"ef"]
    assert log.found == [2]


async def test_without_wait_a_live_log_has_no_more_and_its_end_is_told_apart() -> None:
    log = MemoryLog([(OUT, b"abc")])
    with following(log) as follower:
        assert await rest_of(follower) == [b"abc"]
        assert (follower.behind, follower.ends) == (False, False)
        log.sealed = True
        assert (await follower.receive(), follower.ends) == (None, True)
        with pytest.raises(OutputError):
            follower.check_whole()


async def test_hidden_bytes_are_passed_over_and_other_tasks_run_meanwhile() -> None:
    log, turns = MemoryLog([(ERR, b"x")] * 50 + [(OUT, b"abc")]), 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    with following(log, streams=frozenset({OUT})) as follower:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(count)
            await trio.lowlevel.checkpoint()
            assert await rest_of(follower) == [b"abc"]
            nursery.cancel_scope.cancel()
        assert (follower.offset, turns >= 49) == (53, True)


async def test_beginning_is_set_before_the_first_read_and_checked() -> None:
    log = MemoryLog([(OUT, b"abcdef")])
    with following(log) as follower:
        with pytest.raises(InvalidParams):
            follower.begin(StartPlace(7, ()))
        assert follower.offset == 0
        rules = (LineStart(OUT),)
        follower.begin(StartPlace(4, rules))
        assert (follower.offset, follower.starts) == (4, rules)
        assert await rest_of(follower) == [b"ef"]
        assert follower.starts == ()
    with pytest.raises(trio.ClosedResourceError):
        follower.begin(StartPlace(0, ()))


async def test_each_stream_begins_with_a_line() -> None:
    """The rule of a stream holds until its first line is found, and of the other one still then."""
    log = MemoryLog([(OUT, b"rest\n"), (ERR, b"half"), (OUT, b"line\n"), (ERR, b"of\nerr\n")])
    log.skips = {0: None, 5: None, 9: 0, 14: 3}
    with following(log, starts=(LineStart(OUT), LineStart(ERR))) as follower:
        first = await follower.receive()
        assert first is not None
        assert (bytes(first.data), first.offset) == (b"line\n", 9)
        assert follower.starts == (LineStart(ERR),)
        assert await rest_of(follower) == [b"err\n"]
    assert log.found == [0, 17]


async def test_wait_ends_with_bytes_that_the_reader_does_not_want_and_goes_on() -> None:
    log = MemoryLog()
    with following(log, streams=frozenset({OUT})) as follower:
        got = list[LogChunk | None]()

        async def receive() -> None:
            got.append(await follower.receive())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            for piece in ((ERR, b"err"), (OUT, b"out")):
                await trio.testing.wait_all_tasks_blocked()
                assert (got, log.waiting) == ([], [follower])
                log.pieces.append(piece)
                for _ in range(3):  # the reader takes one token, and one waits
                    follower.poke()
        assert [chunk and bytes(chunk.data) for chunk in got] == [b"out"]
        assert log.waiting == []


async def test_follower_that_is_closed_while_it_reads_gives_nothing() -> None:
    log = MemoryLog([(OUT, b"abc")])
    follower = following(log)
    log.while_reading = follower.close
    with pytest.raises(trio.ClosedResourceError):
        await follower.read()
    assert follower.offset == 0, "what was not returned is not passed over"
    with pytest.raises(trio.ClosedResourceError):
        await follower.wait_for_more()


async def test_closed_follower_is_forgotten_once_and_cannot_be_poked() -> None:
    log = MemoryLog()
    follower = following(log)
    follower.close()
    follower.close()
    follower.poke()
    assert log.forgotten == [follower]
    with pytest.raises(trio.ClosedResourceError):
        await follower.receive(wait=False)


async def test_iteration_ends_with_the_log() -> None:
    log = MemoryLog([(OUT, b"abc"), (ERR, b"x")], sealed=True)
    with following(log) as follower:
        assert [bytes(chunk.data) async for chunk in follower] == [b"abc", b"x"]
