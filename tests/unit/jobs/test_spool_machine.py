"""The spool against its model: a list of bytes, each of a stream, and nothing else."""

import os
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest
import trio
import trio.testing
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from jobworker.errors import Busy
from jobworker.jobs.output.follower import Follower
from jobworker.jobs.output.index import BOTH, RECORD
from jobworker.jobs.output.pump import Pump
from jobworker.jobs.output.search import Start
from jobworker.jobs.output.spool import Spool
from jobworker.jobs.retention import KeptOutput
from jobworker.model.job import JobId, Stream

T = TypeVar("T")

LINES = st.text("a\n", min_size=1, max_size=12).map(str.encode)
SIZES = st.lists(st.integers(1, 40), max_size=8)


def run(work: Callable[[], Awaitable[T]]) -> T:
    """Run one step under Trio: Hypothesis calls rules from outside."""

    async def step() -> T:
        return await work()

    return trio.run(step)


class SpoolMachine(RuleBasedStateMachine):
    """Append, follow, read, cap, seal, prune, crash and open again, in any order."""

    @initialize(max_bytes=st.none() | st.integers(0, 60))
    def begin(self, max_bytes: int | None) -> None:
        self.directory = Path(tempfile.mkdtemp()) / "1"
        self.start_over(max_bytes)

    def start_over(self, max_bytes: int | None) -> None:
        self.max_bytes = max_bytes
        self.log: list[tuple[Stream, int]] = []
        self.ends: list[int] = []  # where each record of output ends
        self.discarded = 0
        self.sealed = False
        self.now_ns = 0
        self.live: dict[Follower, tuple[set[Stream], bool]] = {}
        self.spool = Spool.create(self.directory, clock=self.tick)

    def tick(self) -> int:
        self.now_ns += 1
        return self.now_ns

    def teardown(self) -> None:
        if hasattr(self, "spool"):
            for follower in self.live:
                follower.close()
            self.spool.close()
            held = [os.readlink(f"/proc/self/fd/{fd}") for fd in self.open_fds()]
            shutil.rmtree(self.directory.parent)
            assert not [path for path in held if path.startswith(str(self.directory))]

    def open_fds(self) -> list[str]:
        return [fd for fd in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{fd}")]

    # --- the job ----------------------------------------------------------------------------

    @precondition(lambda self: not self.sealed)
    @rule(
        pieces=st.lists(
            st.tuples(st.sampled_from(Stream), st.binary(min_size=1, max_size=12) | LINES),
            min_size=1,
            max_size=6,
        )
    )
    def append(self, pieces: list[tuple[Stream, bytes]]) -> None:
        for stream, data in pieces:
            read_end, write_end = os.pipe()
            os.set_blocking(read_end, False)
            os.write(write_end, data)
            os.close(write_end)
            with Pump(self.spool, {stream: read_end}, max_bytes=self.max_bytes) as pump:
                run(pump.run)
            room = len(data)
            if self.max_bytes is not None:
                room = max(0, min(room, self.max_bytes - len(self.log)))
            self.log += [(stream, byte) for byte in data[:room]]
            if room:
                self.ends.append(len(self.log))
            self.discarded += len(data) - room

    @precondition(lambda self: not self.sealed)
    @rule()
    def seal(self) -> None:
        run(self.spool.seal)
        self.sealed = True

    # --- those who follow -------------------------------------------------------------------

    @rule(
        at=st.just(0) | st.integers(0, 1000),
        streams=st.sampled_from([BOTH, BOTH, *({stream} for stream in Stream)]),
        coalesce=st.booleans(),
        sizes=SIZES,
    )
    def follow(self, at: int, streams: set[Stream], coalesce: bool, sizes: list[int]) -> None:
        follower = self.spool.follow(at % (len(self.log) + 1), streams=streams, coalesce=coalesce)
        self.live[follower] = (streams, coalesce)
        for max_bytes in sizes:
            self.receive_one(follower, max_bytes)

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 100), sizes=SIZES)
    def receive(self, which: int, sizes: list[int]) -> None:
        follower = list(self.live)[which % len(self.live)]
        for max_bytes in sizes:
            self.receive_one(follower, max_bytes)

    def receive_one(self, follower: Follower, max_bytes: int) -> None:
        streams, coalesce = self.live[follower]
        rest = range(follower.offset, len(self.log))
        first = next((place for place in rest if self.log[place][0] in streams), None)
        if first is None and not self.sealed:
            run(lambda: self.receive_nothing(follower))
            return
        chunk = run(lambda: follower.receive(max_bytes))
        if first is None:
            assert chunk is None
            return
        stream = self.log[first][0]
        end = next((n for n in range(first, len(self.log)) if self.log[n][0] != stream), None)
        if not coalesce:
            end = next(end for end in self.ends if end > first)
        expected = self.log[first:end][:max_bytes]
        assert chunk is not None
        assert (chunk.offset, chunk.stream) == (first, stream)
        got = [(stream, byte) for byte in chunk.data]
        # The chunk may be one that another follower was given at this place, before more came.
        assert got == (expected if len(self.live) == 1 else expected[: len(got)])
        assert got
        assert follower.offset == chunk.end

    async def receive_nothing(self, follower: Follower) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(follower.receive)
            await trio.testing.wait_all_tasks_blocked()
            assert self.spool.statistics().idle_followers == 1
            nursery.cancel_scope.cancel()

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 100))
    def leave(self, which: int) -> None:
        follower = list(self.live)[which % len(self.live)]
        del self.live[follower]
        follower.close()

    @rule(lines=st.integers(0, 8), streams=st.sampled_from([BOTH, *({s} for s in Stream)]))
    def find_tail(self, lines: int, streams: set[Stream]) -> None:
        starts, before = [], dict.fromkeys(Stream, ord("\n"))
        for place, (stream, byte) in enumerate(self.log):
            if before[stream] == ord("\n") and stream in streams:
                starts.append(place)
            before[stream] = byte
        expected = (starts[-lines:] if lines else [])[:1] or [len(self.log)]
        start = Start(tail_lines=lines)
        assert run(lambda: self.spool.find_start(start, streams)).offset == expected[0]

    # --- retention --------------------------------------------------------------------------

    @rule(force=st.booleans())
    def prune_what_is_in_use(self, force: bool) -> None:
        if not (self.sealed and force):
            with pytest.raises(Busy):
                KeptOutput(self.directory.parent).remove(JobId(1), force=force)
            assert self.directory.exists()

    @precondition(lambda self: self.sealed)
    @rule()
    def prune_under_followers(self) -> None:
        """All of it is gone at once, and who reads it reads on to its end; then a new job."""
        size = sum(file.stat().st_size for file in self.directory.iterdir())
        assert KeptOutput(self.directory.parent).remove(JobId(1), force=True) == size
        assert not self.directory.exists()
        for follower in self.live:
            while follower.offset < len(self.log):
                self.receive_one(follower, 7)
            follower.close()
        self.spool.close()
        self.start_over(self.max_bytes)

    # --- the host ---------------------------------------------------------------------------

    @rule(torn_bytes=st.just(0) | st.integers(0, 3 * RECORD.size))
    def crash(self, torn_bytes: int) -> None:
        """The process dies; what the index lost of its end tells of a write in the midst."""
        for follower in self.live:
            follower.close()
        self.live.clear()
        self.spool.close()
        index = self.directory / "index"
        size = max(0, index.stat().st_size - torn_bytes)
        if torn_bytes:
            os.truncate(index, size)
        self.spool = Spool.open(self.directory, clock=self.tick)
        self.lose_records_after(size // RECORD.size, cut=torn_bytes > 0)

    def lose_records_after(self, records: int, cut: bool) -> None:
        statistics = self.spool.statistics()
        if cut:
            self.sealed = False
        # Marks stand among the records of output: how many were left, the log itself must say.
        outputs = [end for end in self.ends if end <= self.intact_bytes(records)]
        intact = outputs[-1] if outputs else 0
        tail = self.log[intact:]
        parts = [[entry for entry in tail if entry[0] is stream] for stream in Stream]
        self.log = self.log[:intact] + parts[0] + parts[1]
        self.ends = outputs
        for end in (intact + len(parts[0]), len(self.log)):
            if end > (self.ends[-1] if self.ends else 0):
                self.ends.append(end)
        # The sum is recorded when sealed; before that, that there was something.
        assert statistics.discarded_bytes <= self.discarded
        if not cut:
            assert statistics.truncated == (self.discarded > 0)
        self.discarded = statistics.discarded_bytes

    def intact_bytes(self, records: int) -> int:
        """The size of the log after its first `records` records."""
        if not records:
            return 0
        raw = (self.directory / "index").read_bytes()
        _, stdout_bytes, stderr_bytes, _ = RECORD.unpack_from(raw, (records - 1) * RECORD.size)
        return int(stdout_bytes) + int(stderr_bytes)

    # --- always -----------------------------------------------------------------------------

    @invariant()
    def statistics_agree(self) -> None:
        if not hasattr(self, "spool"):
            return
        statistics = self.spool.statistics()
        for stream, size in (
            (Stream.STDOUT, statistics.stdout_bytes),
            (Stream.STDERR, statistics.stderr_bytes),
        ):
            assert size == sum(each is stream for each, _ in self.log)
        assert statistics.discarded_bytes == self.discarded
        assert statistics.sealed == self.sealed
        assert statistics.followers == len(self.live)
        assert statistics.idle_followers == 0

    @precondition(lambda self: self.sealed)
    @rule()
    def replay(self) -> None:
        spool = Spool.open(self.directory)
        seen: list[tuple[Stream, int]] = []

        async def follow() -> None:
            with spool.follow() as follower:
                async for chunk in follower:
                    assert chunk.offset == len(seen)
                    seen.extend((chunk.stream, byte) for byte in chunk.data)

        run(follow)
        spool.close()
        assert seen == self.log


TestSpool = SpoolMachine.TestCase
TestSpool.settings = settings(stateful_step_count=40)
