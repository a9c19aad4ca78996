"""Bounds what moving the output of many jobs takes of the processor, for the event loop's sake.

Each time that a pump moves what stands in a pipe costs a thread and some turns of the event loop,
and all of that needs the interpreter's lock. A job that writes a byte at a time can have its output
moved a thousand times a second, and a few dozen such jobs would leave the event loop little. So
where the streams of many jobs are busy, all moves together draw on one account, and a stream that
was moved a moment ago rests while the account is overdrawn. Its output gathers in the pipe, and the
next move takes all of it. A stream that was silent for longer never rests, and few streams have no
bound.
"""

import math
import time
from collections.abc import Callable
from typing import TypeVar

import trio
from attrs import define, field

from jobworker.bucket import Bucket

T = TypeVar("T")

FEW = 4
"""So many streams have no bound: two jobs that write to both."""
BUSY_SECONDS = 5.0
"""A stream that was moved within this time is busy. It is more than a rest of 200 streams takes."""
SHARE = 0.15
"""What all moves together may take of a processor in the long run, where many streams are busy.

With 0.3, a client's `true` took five times as long beside 40 jobs that write a byte at a time, and
with this two to three times. Whole pipes of a mebibyte are still moved at 150 MB/s."""
BURST_SECONDS = 0.05
MAX_REST_SECONDS = 1.0
"""For so long a stream rests at the most: streams that write seldom draw on the account and do not
rest, so what is overdrawn could grow without end."""
LOOP_SECONDS = 0.0005
"""What a move takes of the event loop and of the lock, beside what its thread takes."""


@define(eq=False)
class OutputPace:
    """The account of all pumps of a service."""

    _moved_at: dict[object, float] = field(factory=dict, init=False)
    """When each busy stream was moved last, the latest at the end."""
    _account: Bucket = field(factory=lambda: Bucket(0.0, BURST_SECONDS, SHARE), init=False)

    @property
    def is_crowded(self) -> bool:
        """Whether more than a few streams are busy. May be asked in a thread."""
        return len(self._moved_at) > FEW

    async def rest(self, stream: object, cost_seconds: float) -> None:
        """Wait, after a move of a stream that took so much of a processor, until it may go on."""
        now = trio.current_time()
        while self._moved_at:
            longest = next(iter(self._moved_at))
            if self._moved_at[longest] > now - BUSY_SECONDS:
                break
            del self._moved_at[longest]
        silent_seconds = now - self._moved_at.pop(stream, -math.inf)
        self._moved_at[stream] = now
        if not self.is_crowded:
            return
        if self._account.seconds_overdrawn(now) < MAX_REST_SECONDS:
            self._account.draw(now, cost_seconds + LOOP_SECONDS)
        seconds = min(self._account.seconds_overdrawn(now), MAX_REST_SECONDS)
        if silent_seconds < 2 * seconds:
            await trio.sleep(seconds)


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """Do work in a thread: what it returns, and what it took of a processor, in seconds."""
    began = time.thread_time()
    return work(), time.thread_time() - began
