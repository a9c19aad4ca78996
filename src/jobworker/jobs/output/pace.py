"""Bounds the processor time for moving the output of many jobs, so that the event loop has enough.

Each move from a pipe to the spool costs a thread and some turns of the event loop, and all of that
needs the interpreter's lock. The output of a job that writes a byte at a time could be moved a
thousand times a second. A few dozen such jobs would leave the event loop little. So if many streams
are busy, all moves together get a part of a processor: a stream that was moved a moment ago rests
while its account is overdrawn. Its output gathers in the pipe, and the next move takes all of it. A
stream that was silent before never rests, and a few streams have no bound.

Each owner has two accounts. One is for streams that write much: they would fill their pipes during
a rest, and their jobs would have to wait. The other is for all other streams, which lose nothing by
a rest. So jobs that write a byte at a time slow down neither other owners nor jobs that write much.
An account gets the part that the others leave, and at least an equal part.
"""

import math
import time
from collections.abc import Callable
from typing import TypeVar

from attrs import define, field

from jobworker.token_bucket import TokenBucket

T = TypeVar("T")

FEW = 4
"""The most busy streams without a bound: those of two jobs that write to both streams."""
BUSY_SECONDS = 5.0
"""A stream that was moved within this time is busy. Even among 200 busy streams each one is moved
more often than that."""
SHARE = 0.15
"""The part of a processor that all moves together may take in the long run if many streams are
busy.

With 0.3, a client's `true` took five times as long beside 40 jobs that write a byte at a time. With
0.15 it takes two to three times as long. Whole pipes of a mebibyte are still moved at 150 MB/s."""
BURST_SECONDS = 0.05
"""The capacity of an account, in seconds of processor time."""
MAX_REST_SECONDS = 1.0
"""The longest rest. Without this bound the debt of an account could grow without end: streams that
write seldom draw on it too, and do not rest."""
LOOP_SECONDS = 0.0005
"""The processor time of a move outside of its thread: in the event loop, and for the lock."""
MEAN_SECONDS = 1.0
"""The time constant of the mean by which recent use counts."""
MUCH, FULL = 0.5, 0.75
"""Parts of a pipe. A stream that would fill the first one during a rest writes much. A stream that
has filled the second one may already make its job wait."""
LEAST_SECONDS = 0.01
"""The shortest silence from which a stream's rate is computed; a shorter one counts as this."""


@define(eq=False)
class _Use:
    """The use of a processor: a mean that decays exponentially."""

    _seconds: float = 0.0
    _at: float = 0.0

    def add(self, now: float, seconds: float) -> None:
        self._seconds = self.share(now) * MEAN_SECONDS + seconds
        self._at = now

    def share(self, now: float) -> float:
        return self._seconds / MEAN_SECONDS * math.exp((self._at - now) / MEAN_SECONDS)


@define(eq=False)
class _Account:
    """The processor time that all streams of one kind and one owner share."""

    bucket: TokenBucket
    use: _Use = field(factory=_Use)
    drawn_at: float = -math.inf


@define(eq=False)
class OutputPace:
    """The accounts of all pumps of a service."""

    _moved_at: dict[object, float] = field(factory=dict, init=False)
    """The time of each busy stream's last move, in the order of these times."""
    _accounts: dict[tuple[str, bool], _Account] = field(factory=dict, init=False)
    """By the owner and by whether the streams write much, in the order of the last use."""
    _use: _Use = field(factory=_Use, init=False)
    """The use of all accounts together."""

    @property
    def is_crowded(self) -> bool:
        """Whether more than `FEW` streams are busy. May be read in any thread."""
        return len(self._moved_at) > FEW

    def rest_after(
        self, now: float, owner: str, stream: object, cost_seconds: float, filled: float
    ) -> float:
        """Record a move, and return how many seconds the stream has to rest after it.

        `now`: by Trio's clock. `cost_seconds`: the processor time of the move's thread. `filled`:
        the part of the pipe that was full before the move, more than 0.
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
        if seconds and writes_much:  # a larger move costs hardly more than a small one
            seconds = max(seconds, fills_in)
        return seconds if silent_seconds < 2 * seconds else 0.0

    def _draw(self, now: float, key: tuple[str, bool], cost_seconds: float) -> float:
        """Draw on an account. Returns how many seconds it is overdrawn then."""
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
    """Call `work`. Returns its result and the processor time of this thread for it, in seconds."""
    began = time.thread_time()
    return work(), time.thread_time() - began
