"""The pump: moves a job's output from its pipes into the spool until the last writer is gone.

A task for each pipe waits until the pipe is readable. Then a thread moves its bytes by splice(2),
so the event loop never waits for the disk. While the disk is slow, the pipe fills and the job
waits, as with any pipe (backpressure).

The pump discards output so that the job can go on: all output beyond `max_bytes` (it sets
`capped`), and all output after `discard()`. The spool counts the discarded bytes. If the disk
refuses, or if the budget that all jobs share is used up, `run` raises, and the caller decides.

A pump can be cancelled and run again: bytes that no thread has begun to move are still in the pipe.
A descendant of a job may hold a pipe open for ever. So the caller bounds a job's end like this:

    with trio.move_on_after(GRACE):
        await pump.run()
    await pump.drain()
"""

import fcntl
import os
import select
import struct
import termios
import time
from collections.abc import Mapping
from functools import partial
from typing import Self

import trio
from attrs import define, field

from jobworker.errors import OutputError
from jobworker.jobs.output.budget import OutputBudget
from jobworker.jobs.output.index import RECORD
from jobworker.jobs.output.pace import OutputPace, timed
from jobworker.jobs.output.spool import Spool
from jobworker.model.job import Stream

TURN_BYTES = 1 << 20
"""The most bytes that one move takes: the capacity of a job's pipe."""
FLOOD_BYTES = TURN_BYTES // 4
"""A move of so many bytes is a flood: its thread goes on and moves what follows."""
FLOOD_SECONDS = 0.02
"""How long a thread goes on with a flood."""
FLOOD_PAUSE_MS = 2
"""A pause of so many milliseconds ends a flood."""
BUSY_BYTES, BUSY_SECONDS = 4096, 0.002
"""A move of so many bytes, so soon after the last turn, is a flood too: that of a job which writes
little at a time."""
GATHER_SECONDS = 0.0005
"""How long a thread lets the next bytes of a flood gather if the last move was small: a small move
costs as much as a large one."""
DISCARD_BYTES = 1 << 16
MIN_INDEX_BYTES = 1 << 20
"""The index may have this size even if `max_bytes` is smaller."""


def _owned(pipes: Mapping[Stream, int]) -> dict[Stream, int]:
    return dict(pipes)


@define(eq=False)
class Pump:
    """Moves one job's output. Owns the read ends of the pipes and closes them.

    `pipes` are non-blocking. `max_bytes` bounds the log, which is both streams together, and also
    the index, which has 32 bytes for each move; None is no bound.
    """

    _spool: Spool
    _pipes: dict[Stream, int] = field(converter=_owned)
    _max_bytes: int | None = field(kw_only=True, default=None)
    _budget: OutputBudget | None = field(kw_only=True, default=None)
    _pace: OutputPace = field(kw_only=True, factory=OutputPace)
    """Shared by the pumps of all jobs."""
    _owner: str = field(kw_only=True, default="")
    """The job's owner: the streams of one owner share two accounts of `_pace`."""
    capped: trio.Event = field(init=False, factory=trio.Event)
    """Set once something was discarded because of `max_bytes`."""
    _discarding: bool = field(init=False, default=False)
    _over: bool = field(init=False, default=False)
    _hurried: trio.Event = field(init=False, factory=trio.Event)
    _turn_ended: dict[Stream, float] = field(init=False, factory=dict)

    async def run(self) -> None:
        """Move output until every pipe is at its end.

        Raises OutputError as soon as the disk or the budget refuses. Nothing is lost then, and the
        pipes stay open. The caller decides: it may run the pump again later, discard the rest
        (`discard`, then run again), or end the job.
        """
        failures: list[OutputError] = []

        async def move(stream: Stream) -> None:
            try:
                await self._move_all(stream)
            except OutputError as error:
                failures.append(error)
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for stream in self._pipes:
                nursery.start_soon(move, stream)
        if failures:
            raise failures[0]

    async def _move_all(self, stream: Stream) -> None:
        while stream in self._pipes:
            await trio.lowlevel.wait_readable(self._pipes[stream])
            try:
                moved, cost = await self._spool.write(
                    partial(timed, partial(self._move_turn, stream))
                )
            except BlockingIOError:  # the pipe is empty after all
                continue
            self._tell_if_capped()
            if not moved:
                os.close(self._pipes.pop(stream))
            else:
                await self._rest(stream, moved, cost)

    async def _rest(self, stream: Stream, moved: int, cost_seconds: float) -> None:
        """Rest after a move so that others get the processor, unless the pipe has no writer."""
        pipe = self._pipes[stream]
        filled = moved / min(TURN_BYTES, fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ))
        seconds = self._pace.rest_after(
            trio.current_time(), self._owner, (id(self), stream), cost_seconds, filled
        )
        if seconds and not _has_no_writer(pipe):
            with trio.move_on_after(seconds):
                await self._hurried.wait()

    def hurry(self) -> None:
        """End the present rests: the job has exited, and its end waits for its output.

        If a process outside of the job writes to a pipe later, its output has rests again.
        """
        self._hurried.set()
        self._hurried = trio.Event()

    async def drain(self) -> None:
        """Move the bytes that are in the pipes now, without waiting for more. Not during `run`.

        Shielded from cancellation: it waits only for the disk to take at most 1 MiB of each pipe.
        Raises OutputError as `run` does.
        """
        with trio.CancelScope(shield=True):
            for stream in self._pipes:
                await self._spool.write(partial(self._drain, stream))
                self._tell_if_capped()

    def _tell_if_capped(self) -> None:
        if self._over:
            self.capped.set()

    def discard(self) -> None:
        """Discard all output from now on, so that the job can go on though the disk is full."""
        self._discarding = True

    def close(self) -> None:
        """Close the pipes, so that the job's next write fails with EPIPE. Not during `run`."""
        while self._pipes:
            os.close(self._pipes.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # --- in a thread ------------------------------------------------------------------------

    def _move_turn(self, stream: Stream) -> int:
        """Move the bytes in a pipe. In a flood go on for a moment, which saves turns of the loop.

        Returns the number of bytes that were moved or discarded; 0 at the pipe's end. Raises
        BlockingIOError if the pipe is empty, OutputError.
        """
        follows_another = time.monotonic() - self._turn_ended.get(stream, 0.0) < BUSY_SECONDS
        moved = self._move(stream, TURN_BYTES)
        is_flood = moved >= (BUSY_BYTES if follows_another else FLOOD_BYTES)
        if is_flood and not self._pace.is_crowded:
            moved += self._move_flood(stream, moved)
        self._turn_ended[stream] = time.monotonic()
        return moved

    def _move_flood(self, stream: Stream, last: int) -> int:
        """Go on after a move of `last` bytes. Returns how many more bytes were moved."""
        poll, ends_at, moved = select.poll(), time.monotonic() + FLOOD_SECONDS, 0
        poll.register(self._pipes[stream], select.POLLIN)
        while time.monotonic() < ends_at and poll.poll(FLOOD_PAUSE_MS):
            if last < FLOOD_BYTES:
                time.sleep(GATHER_SECONDS)
            try:
                last = self._move(stream, TURN_BYTES)
            except (BlockingIOError, OutputError):  # the next turn meets the error again
                break
            if not last:
                break
            moved += last
        return moved

    def _move(self, stream: Stream, limit: int) -> int:
        """Append or discard at most `limit` bytes of a pipe. Results as for `_move_turn`."""
        if self._discarding:
            return self._discard(stream, limit)
        if self._max_bytes is not None:
            room = self._max_bytes - self._spool.written_bytes
            if room <= 0 or self._spool.index_bytes > max(self._max_bytes, MIN_INDEX_BYTES):
                discarded = self._discard(stream, limit)
                self._over = self._over or discarded > 0
                return discarded
            limit = min(limit, room)
        if self._budget is None:
            return self._spool.append_from_pipe(stream, self._pipes[stream], limit)
        return self._append_within(self._budget, stream, limit)

    def _append_within(self, budget: OutputBudget, stream: Stream, limit: int) -> int:
        # Reserve no more than the bytes that wait: a nearly used-up budget need not refuse them.
        waiting = min(limit, self._waiting_bytes(stream))
        room = budget.reserve(waiting) if waiting else 1  # the pipe's end needs no room
        before = self._spool.written_bytes
        try:
            return self._spool.append_from_pipe(stream, self._pipes[stream], room)
        finally:  # also after an error: if the disk refused only the record, the bytes are there
            moved = self._spool.written_bytes - before
            budget.release(waiting and room - moved)
            if moved:
                budget.count(RECORD.size)
                self._spool.counted_bytes += moved + RECORD.size

    def _discard(self, stream: Stream, limit: int) -> int:
        # read(2), not a splice to /dev/null, which needs a descriptor that may not be left.
        discarded = len(os.read(self._pipes[stream], min(limit, DISCARD_BYTES)))
        try:
            while 0 < discarded < limit:
                count = len(os.read(self._pipes[stream], min(limit - discarded, DISCARD_BYTES)))
                if not count:
                    break
                discarded += count
        except BlockingIOError:
            pass
        if discarded:
            self._spool.count_discarded(discarded)
        return discarded

    def _drain(self, stream: Stream) -> None:
        # Only the bytes that are there now: a job that goes on writing would never end this.
        left = self._waiting_bytes(stream)
        while left and (moved := self._move(stream, left)):
            left -= moved

    def _waiting_bytes(self, stream: Stream) -> int:
        answer = fcntl.ioctl(self._pipes[stream], termios.FIONREAD, struct.pack("i", 0))
        return int(struct.unpack("i", answer)[0])


def _has_no_writer(pipe: int) -> bool:
    """Whether no process has the write end of a pipe any more, so that no bytes will follow."""
    poll = select.poll()
    poll.register(pipe, 0)  # poll(2) reports POLLHUP without being asked to
    return bool(poll.poll(0))
