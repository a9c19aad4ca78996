"""The launcher's turns: waits for descriptors and moments, and calls whoever watches them.

One epoll(7) and a handful of alarms. An alarm is known by the function that it calls, so that
there is one of each: setting it again moves it. A watched descriptor is closed by its owner, after
`unwatch`; one that was closed by an earlier call of the same turn is not called any more.

An unexpected exception ends the call that it struck and no more: the log has it, it is counted, and
what raised it is called again a while later, where it is still watched. All jobs would end with the
launcher otherwise. What is not watched any more, such as the rest of an end, is called by
`see_through`.

A turn takes few events, so that one with many of them keeps nobody waiting, and is timed: all jobs
wait for the longest one. What counts is how long the thread ran or waited for the kernel; the time
for which it was ready and had no CPU is the scheduler's (/proc/PID/schedstat, proc(5)) and not
counted.

Standard library only.
"""

import os
import select
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from jobworker.sandbox.log import say, say_fault

Call = Callable[[], None]
EVENTS_A_TURN = 16
SLOW_SECONDS = 0.02
"""The promise: no turn is longer. One that is, is told in the log."""
AGAIN_SECONDS = 1.0
"""What has raised an exception rests this long: it may raise one each time."""
TRIES = 10
"""How often `see_through` calls in all: over some eight minutes, since each pause doubles."""
_LOOK_SECONDS = 0.002
"""A shorter turn is not looked at more closely."""


class TurnTimes(NamedTuple):
    """What turns have taken since this was last asked for."""

    turns: int
    longest_ms: float
    slowest: str
    """What was called in the longest one, by name."""
    over_bound: int
    """How many took longer than `SLOW_SECONDS`."""
    incidents: int
    """How many unexpected exceptions there were."""


class Turns:
    """Who waits for what."""

    def __init__(self) -> None:
        self._poll = select.epoll()
        self._sources: dict[int, Call] = {}
        self._events: dict[int, int] = {}
        """What each source is watched for."""
        self._resting: set[int] = set()
        """Sources that have raised an exception, and are not in the kernel's list meanwhile."""
        self._alarms: dict[Call, float] = {}
        self._delays = _open_delays()
        self._times = TurnTimes(0, 0.0, "", 0, 0)
        self._slowest_told = SLOW_SECONDS

    def watch(self, descriptor: int, call: Call) -> None:
        """Call whenever the descriptor is readable, or at its end. Raises OSError."""
        self._poll.register(descriptor, select.EPOLLIN)
        self._sources[descriptor], self._events[descriptor] = call, select.EPOLLIN

    def watch_room(self, descriptor: int, wanted: bool) -> None:
        """Call a watched descriptor's watcher also when it is writable, or no longer so."""
        self._events[descriptor] = select.EPOLLIN | (select.EPOLLOUT if wanted else 0)
        if descriptor not in self._resting:
            self._poll.modify(descriptor, self._events[descriptor])

    def unwatch(self, descriptor: int) -> None:
        """Stop watching; nothing happens where it is not watched."""
        if self._sources.pop(descriptor, None) is None:
            return
        if descriptor in self._resting:
            self._resting.discard(descriptor)
        else:
            self._poll.unregister(descriptor)

    def watches(self, descriptor: int) -> bool:
        """Whether the descriptor is watched."""
        return descriptor in self._sources

    def call_in(self, seconds: float, call: Call) -> None:
        """Call once, so many seconds from now, instead of when that was to be called before."""
        self._alarms[call] = time.monotonic() + seconds

    def is_set(self, call: Call) -> bool:
        """Whether it is going to be called."""
        return call in self._alarms

    def cancel(self, call: Call) -> None:
        """Undo `call_in`."""
        self._alarms.pop(call, None)

    def see_through(self, call: Call, tried: int = 0) -> None:
        """Call now, and again later where that raises an unexpected exception, up to `TRIES` times.

        For what nobody asks for a second time: a process ends once.
        """
        if self._survive(call):
            return
        tried += 1
        if tried < TRIES:
            pause = AGAIN_SECONDS * 2 ** (tried - 1)
            self.call_in(pause, partial(self.see_through, call, tried))
        else:
            say(f"{_name(call)} is given up: it has failed {tried} times")

    def turn(self) -> None:
        """Wait until there is something to do, and do it."""
        ready = self._poll.poll(self._patience(), EVENTS_A_TURN)
        delayed = self._delay()
        began = last = time.monotonic()
        slowest: tuple[float, Call | None] = (0.0, None)
        for descriptor, _ in ready:
            source = self._sources.get(descriptor)
            if source is not None:
                if not self._survive(source) and self._sources.get(descriptor) is source:
                    self._rest(descriptor)
                now = time.monotonic()
                slowest, last = max(slowest, (now - last, source), key=_seconds), now
        for call, moment in list(self._alarms.items()):
            if moment <= last and self._alarms.get(call) == moment:
                del self._alarms[call]
                if not self._survive(call):
                    self.call_in(AGAIN_SECONDS, call)
                now = time.monotonic()
                slowest, last = max(slowest, (now - last, call), key=_seconds), now
        self._note(last - began, delayed, slowest[1])

    def take_times(self) -> TurnTimes:
        """What turns have taken since this was last called."""
        times, self._times = self._times, TurnTimes(0, 0.0, "", 0, 0)
        return times

    def record(self, struck: str) -> str:
        """Log and count the exception that is being handled. Returns the incident's number."""
        number = os.urandom(4).hex()
        say_fault(f"incident {number}: {struck}")
        self._times = self._times._replace(incidents=self._times.incidents + 1)
        return number

    def _survive(self, call: Call) -> bool:
        """Call, and tell whether it has returned."""
        try:
            call()
        except Exception:  # noqa: BLE001 - recorded; here it would end all jobs
            self.record(_name(call))
            return False
        return True

    def _rest(self, descriptor: int) -> None:
        self._poll.unregister(descriptor)
        self._resting.add(descriptor)
        if not self.is_set(self._end_rests):
            self.call_in(AGAIN_SECONDS, self._end_rests)

    def _end_rests(self) -> None:
        for descriptor in list(self._resting):
            self._poll.register(descriptor, self._events[descriptor])
            self._resting.discard(descriptor)

    def _note(self, seconds: float, delayed: bytes, slowest: Call | None) -> None:
        turns, longest_ms, name, over, incidents = self._times
        if seconds > _LOOK_SECONDS and slowest is not None:
            seconds -= max(0.0, _nanoseconds(self._delay()) - _nanoseconds(delayed)) / 1e9
            if seconds * 1000 > longest_ms:
                longest_ms, name = seconds * 1000, _name(slowest)
            over += seconds > SLOW_SECONDS
            if seconds > self._slowest_told:  # each time that it grew by half, not at each turn
                self._slowest_told = 1.5 * seconds
                say(f"a turn took {seconds * 1000:.0f} ms, most of it {_name(slowest)}")
        self._times = TurnTimes(turns + 1, longest_ms, name, over, incidents)

    def _delay(self) -> bytes:
        try:
            return b"" if self._delays is None else os.pread(self._delays, 96, 0)
        except OSError:  # the kernel has no memory for it just now
            return b""

    def _patience(self) -> float | None:
        if not self._alarms:
            return None
        return max(0.0, min(self._alarms.values()) - time.monotonic())


def _open_delays() -> int | None:
    try:
        return os.open("/proc/self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # a kernel without CONFIG_SCHED_INFO: delays are counted, then
        return None


def _nanoseconds(schedstat: bytes) -> int:
    """Time spent ready without a CPU, in the second field."""
    fields = schedstat.split()
    return int(fields[1]) if len(fields) > 1 else 0


def _seconds(entry: tuple[float, Call | None]) -> float:
    return entry[0]


def _name(call: Call) -> str:
    inner = call.func if isinstance(call, partial) else call
    return str(getattr(inner, "__qualname__", inner))
