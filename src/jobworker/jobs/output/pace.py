"""Bounds what moving the output of many jobs takes of the processor, for the event loop's sake.

Each time that a pump moves what stands in a pipe costs a thread and some turns of the event loop,
and all of that needs the interpreter's lock. A job that writes a byte at a time can have its output
moved a thousand times a second, and a few dozen such jobs would leave the event loop little. So
where the streams of many jobs are busy, all moves together get a part of a processor, and a stream
that was moved a moment ago rests while its account is overdrawn. Its output gathers in the pipe,
and the next move takes all of it. A stream that was silent for longer never rests, and few streams
have no bound.

Each owner has two accounts: one for streams that would fill their pipes while they rest, and wait
then, and one for all others, which lose nothing by a rest. So who writes a byte at a time slows
down neither other owners nor what writes much. An account gets what the others leave, and an equal
part at the least.
"""

import math
import time
from collections.abc import Callable
from typing import TypeVar

from attrs import define, field

from jobworker.token_bucket import TokenBucket

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
MEAN_SECONDS = 1.0
"""For so long what was taken counts as being taken still, on the average."""
MUCH, FULL = 0.5, 0.75
"""Parts of a pipe: a stream that fills the one during a rest writes much, and who fills the other
may wait already."""
LEAST_SECONDS = 0.01
"""What comes in less time says nothing of how fast a stream is."""


@define(eq=False)
class _Use:
    """What is taken of a processor: a mean that decays."""

    _seconds: float = 0.0
    _at: float = 0.0

    def add(self, now: float, seconds: float) -> None:
        self._seconds = self.share(now) * MEAN_SECONDS + seconds
        self._at = now

    def share(self, now: float) -> float:
        return self._seconds / MEAN_SECONDS * math.exp((self._at - now) / MEAN_SECONDS)


@define(eq=False)
class _Account:
    """What some of an owner's streams share."""

    bucket: TokenBucket
    use: _Use = field(factory=_Use)
    drawn_at: float = -math.inf


@define(eq=False)
class OutputPace:
    """The accounts of all pumps of a service."""

    _moved_at: dict[object, float] = field(factory=dict, init=False)
    """When each busy stream was moved last, the latest at the end."""
    _accounts: dict[tuple[str, bool], _Account] = field(factory=dict, init=False)
    """By owner, and whether the streams write much; the one drawn on last at the end."""
    _use: _Use = field(factory=_Use, init=False)
    """What is taken by all of them together."""

    @property
    def is_crowded(self) -> bool:
        """Whether more than a few streams are busy. May be asked in a thread."""
        return len(self._moved_at) > FEW

    def rest_after(
        self, now: float, owner: str, stream: object, cost_seconds: float, filled: float
    ) -> float:
        """For how many seconds a stream shall rest after a move, by Trio's clock.

        The move took `cost_seconds` of a processor, and `filled` is what part of the pipe it found
        full, more than 0.
        """
        while self._moved_at:
            longest = next(iter(self._moved_at))
            if self._moved_at[longest] > now - BUSY_SECONDS:
                break
            del self._moved_at[longest]
        silent_seconds = now - self._moved_at.pop(stream, -math.inf)
        self._moved_at[stream] = now
        if not self.is_crowded:
            return 0.0
        fills_in = MUCH * max(silent_seconds, LEAST_SECONDS) / filled if filled < FULL else 0.0
        writes_much = fills_in < MAX_REST_SECONDS
        seconds = self._draw(now, (owner, writes_much), cost_seconds + LOOP_SECONDS)
        if seconds and writes_much:  # a move of more costs hardly more
            seconds = max(seconds, fills_in)
        return seconds if silent_seconds < 2 * seconds else 0.0

    def _draw(self, now: float, key: tuple[str, bool], cost_seconds: float) -> float:
        """Draw on an account: for how long it is overdrawn then."""
        account = self._accounts.pop(key, None) or _Account(TokenBucket(now, BURST_SECONDS, SHARE))
        self._accounts[key] = account
        account.drawn_at = now
        while self._accounts[oldest := next(iter(self._accounts))].drawn_at < now - BUSY_SECONDS:
            del self._accounts[oldest]
        others = self._use.share(now) - account.use.share(now)
        bucket = account.bucket
        bucket.per_second = max(SHARE / len(self._accounts), SHARE - others)
        if bucket.seconds_overdrawn(now) < MAX_REST_SECONDS:
            bucket.draw(now, cost_seconds)
        account.use.add(now, cost_seconds)
        self._use.add(now, cost_seconds)
        return min(bucket.seconds_overdrawn(now), MAX_REST_SECONDS)


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """Do work in a thread: what it returns, and what it took of a processor, in seconds."""
    began = time.thread_time()
    return work(), time.thread_time() - began
