"""The launcher's event loop: calls functions when a descriptor is readable or a time has come.

The loop has one epoll(7) instance, level-triggered, and a few alarms. An alarm is identified by the
function that it calls, so each function has at most one: setting it again moves it. The owner of a
watched descriptor calls `unwatch` before it closes the descriptor. An event of a descriptor that an
earlier call of the same turn has unwatched is dropped.

An unexpected exception ends only the call that raised it, since all jobs would end with the
launcher otherwise. The loop logs and counts it, and calls the function again after a pause if its
descriptor is still watched. Work without a watched descriptor, such as the steps after the end of a
job, uses `call_with_retries`.

A turn is one pass of the loop. It takes a bounded number of events, so that a source with many
events does not delay the others. The loop times each turn, because all jobs wait for the longest
one. The time for which the thread was ready and had no CPU does not count: it depends on the
scheduler (/proc/PID/schedstat, proc(5)).

Standard library only.
"""

import os
import select
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from jobworker.sandbox.log import log_exception, log_line

Callback = Callable[[], None]
EVENTS_A_TURN = 16
SLOW_SECONDS = 0.02
"""The bound that the launcher promises for a turn. The log has each turn that takes longer and is
half as long again as the one before in the log."""
AGAIN_SECONDS = 1.0
"""The pause after a function has raised an exception, since it may raise one each time."""
TRIES = 10
"""How often `call_with_retries` calls in all. Each pause doubles: some 8 minutes together."""
_LOOK_SECONDS = 0.002
"""The scheduler's delay is read only after a turn that took longer, since reading takes time."""


class TurnTimes(NamedTuple):
    """The statistics of the turns since they were last taken."""

    turns: int
    longest_ms: float
    slowest: str
    """The name of the slowest function of the longest turn."""
    over_bound: int
    """How many turns took longer than `SLOW_SECONDS`."""
    incidents: int
    """How many unexpected exceptions there were."""


class EventLoop:
    """The event loop: watched descriptors, alarms, and statistics of its turns."""

    def __init__(self) -> None:
        self._poll = select.epoll()
        self._sources: dict[int, Callback] = {}
        self._events: dict[int, int] = {}
        """The epoll events that each source is watched for."""
        self._resting: set[int] = set()
        """Sources that are not in the epoll set for a pause, after their call has raised."""
        self._alarms: dict[Callback, float] = {}
        self._delays = _open_delays()
        self._times = TurnTimes(0, 0.0, "", 0, 0)
        self._slowest_logged = SLOW_SECONDS

    def watch(self, descriptor: int, call: Callback) -> None:
        """Call `call` whenever the descriptor is readable or at its end. Raises OSError."""
        self._poll.register(descriptor, select.EPOLLIN)
        self._sources[descriptor], self._events[descriptor] = call, select.EPOLLIN

    def watch_writable(self, descriptor: int, wanted: bool, *, alone: bool = False) -> None:
        """Also call when the watched descriptor is writable, if `wanted`; otherwise no longer.

        `alone`: do not call when it is readable meanwhile. Its end is reported in any case.
        """
        events = select.EPOLLOUT if wanted else select.EPOLLIN
        self._events[descriptor] = events if alone else events | select.EPOLLIN
        if descriptor not in self._resting:
            self._poll.modify(descriptor, self._events[descriptor])

    def unwatch(self, descriptor: int) -> None:
        """Stop watching a descriptor. Does nothing if it is not watched."""
        if self._sources.pop(descriptor, None) is None:
            return
        if descriptor in self._resting:
            self._resting.discard(descriptor)
        else:
            self._poll.unregister(descriptor)

    def watches(self, descriptor: int) -> bool:
        """Whether the descriptor is watched."""
        return descriptor in self._sources

    def call_later(self, seconds: float, call: Callback) -> None:
        """Set the alarm of `call` to so many seconds from now, in place of an earlier alarm."""
        self._alarms[call] = time.monotonic() + seconds

    def is_scheduled(self, call: Callback) -> bool:
        """Whether `call` has an alarm."""
        return call in self._alarms

    def cancel(self, call: Callback) -> None:
        """Remove the alarm of `call`, if it has one."""
        self._alarms.pop(call, None)

    def call_with_retries(self, call: Callback, tried: int = 0) -> None:
        """Call now, and again after an unexpected exception, up to `TRIES` times in all.

        For work that no later event would start again: a process, for example, ends only once.
        """
        if self._call(call):
            return
        tried += 1
        if tried < TRIES:
            pause = AGAIN_SECONDS * 2 ** (tried - 1)
            self.call_later(pause, partial(self.call_with_retries, call, tried))
        else:
            log_line(f"{_name(call)} is given up: it has failed {tried} times")

    def run_once(self) -> None:
        """Wait for events or the next alarm, and call what is due: one pass of the loop."""
        ready = self._poll.poll(self._seconds_to_alarm(), EVENTS_A_TURN)
        delayed = self._read_delay()
        began = last = time.monotonic()
        slowest: tuple[float, Callback | None] = (0.0, None)
        for descriptor, _ in ready:
            source = self._sources.get(descriptor)
            if source is not None:
                if not self._call(source) and self._sources.get(descriptor) is source:
                    self._rest(descriptor)
                now = time.monotonic()
                slowest, last = max(slowest, (now - last, source), key=_seconds), now
        for call, moment in list(self._alarms.items()):
            if moment <= last and self._alarms.get(call) == moment:
                del self._alarms[call]
                if not self._call(call):
                    self.call_later(AGAIN_SECONDS, call)
                now = time.monotonic()
                slowest, last = max(slowest, (now - last, call), key=_seconds), now
        self._record_turn(last - began, delayed, slowest[1])

    def take_times(self) -> TurnTimes:
        """The statistics of the turns since this was last called."""
        times, self._times = self._times, TurnTimes(0, 0.0, "", 0, 0)
        return times

    def record(self, failed: str) -> str:
        """Log and count the exception that is being handled. Returns the incident's number.

        `failed` is what has raised it, for the log.
        """
        number = os.urandom(4).hex()
        log_exception(f"incident {number}: {failed}")
        self._times = self._times._replace(incidents=self._times.incidents + 1)
        return number

    def _call(self, call: Callback) -> bool:
        """Call a function, and return False if it has raised an exception, which is recorded."""
        try:
            call()
        except Exception:  # noqa: BLE001 - it is recorded; outside of here it would end all jobs
            self.record(_name(call))
            return False
        return True

    def _rest(self, descriptor: int) -> None:
        self._poll.unregister(descriptor)
        self._resting.add(descriptor)
        if not self.is_scheduled(self._end_rests):
            self.call_later(AGAIN_SECONDS, self._end_rests)

    def _end_rests(self) -> None:
        for descriptor in list(self._resting):
            self._poll.register(descriptor, self._events[descriptor])
            self._resting.discard(descriptor)

    def _record_turn(self, seconds: float, delayed: bytes, slowest: Callback | None) -> None:
        """Count a turn. `delayed` is the scheduler's delay before it, as `_read_delay` has it."""
        turns, longest_ms, name, over, incidents = self._times
        if seconds > _LOOK_SECONDS and slowest is not None:
            seconds -= max(0.0, _nanoseconds(self._read_delay()) - _nanoseconds(delayed)) / 1e9
            if seconds * 1000 > longest_ms:
                longest_ms, name = seconds * 1000, _name(slowest)
            over += seconds > SLOW_SECONDS
            if seconds > self._slowest_logged:  # so slow turns that recur do not fill the log
                self._slowest_logged = 1.5 * seconds
                log_line(f"a turn took {seconds * 1000:.0f} ms, most of it {_name(slowest)}")
        self._times = TurnTimes(turns + 1, longest_ms, name, over, incidents)

    def _read_delay(self) -> bytes:
        try:
            return b"" if self._delays is None else os.pread(self._delays, 96, 0)
        except OSError:  # the kernel has no memory to format the text
            return b""

    def _seconds_to_alarm(self) -> float | None:
        if not self._alarms:
            return None
        return max(0.0, min(self._alarms.values()) - time.monotonic())


def _open_delays() -> int | None:
    try:
        return os.open("/proc/self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # a kernel without CONFIG_SCHED_INFO: turns then include the delay
        return None


def _nanoseconds(schedstat: bytes) -> int:
    """The time for which the thread was ready without a CPU: the second field."""
    fields = schedstat.split()
    return int(fields[1]) if len(fields) > 1 else 0


def _seconds(entry: tuple[float, Callback | None]) -> float:
    return entry[0]


def _name(call: Callback) -> str:
    inner = call.func if isinstance(call, partial) else call
    return str(getattr(inner, "__qualname__", inner))
