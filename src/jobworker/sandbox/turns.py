"""The launcher's turns: waits for descriptors and moments, and calls whoever watches them.

One epoll(7) and a handful of alarms. An alarm is known by the function that it calls, so that
there is one of each: setting it again moves it. A watched descriptor is closed by its owner, after
`unwatch`; one that was closed by an earlier call of the same turn is not called any more.

Standard library only.
"""

import select
import time
from collections.abc import Callable

Call = Callable[[], None]


class Turns:
    """Who waits for what."""

    def __init__(self) -> None:
        self._poll = select.epoll()
        self._sources: dict[int, Call] = {}
        self._alarms: dict[Call, float] = {}

    def watch(self, descriptor: int, call: Call) -> None:
        """Call whenever the descriptor is readable, or at its end."""
        self._sources[descriptor] = call
        self._poll.register(descriptor, select.EPOLLIN)

    def watch_room(self, descriptor: int, wanted: bool) -> None:
        """Call a watched descriptor's watcher also when it is writable, or no longer so."""
        self._poll.modify(descriptor, select.EPOLLIN | (select.EPOLLOUT if wanted else 0))

    def unwatch(self, descriptor: int) -> None:
        """Stop watching; nothing happens where it is not watched."""
        if self._sources.pop(descriptor, None) is not None:
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

    def turn(self) -> None:
        """Wait until there is something to do, and do it."""
        for descriptor, _ in self._poll.poll(self._patience()):
            source = self._sources.get(descriptor)
            if source is not None:
                source()
        now = time.monotonic()
        for call, moment in list(self._alarms.items()):
            if moment <= now and self._alarms.get(call) == moment:
                del self._alarms[call]
                call()

    def _patience(self) -> float | None:
        if not self._alarms:
            return None
        return max(0.0, min(self._alarms.values()) - time.monotonic())
