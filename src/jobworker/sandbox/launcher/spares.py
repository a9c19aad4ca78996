"""The spares: children that wait for an order, and those that are still being made.

The launcher keeps as many as the policy wants. `launcher.child_supply` has them made and gives them
to starts.

Standard library only.
"""

from collections import deque

from jobworker.sandbox.launcher.child import Child


class Spares:
    """The spares in the order in which they were made. `wanted` is how many there should be."""

    def __init__(self, wanted: int) -> None:
        self.wanted = wanted
        self._waiting: deque[Child] = deque()
        self._making: deque[Child] = deque()
        """Spares that the fork server has been asked for and that have no process yet."""

    def __contains__(self, child: Child) -> bool:
        """Whether this child waits for an order."""
        return child in self._waiting

    @property
    def are_left(self) -> bool:
        """Whether a start can have a spare, if only one that is still being made."""
        return bool(self._waiting or self._making)

    @property
    def needs_another(self) -> bool:
        """Whether another spare is to be made. One is made at a time."""
        return not self._making and len(self._waiting) < self.wanted

    def begin(self, child: Child) -> None:
        """Take a spare that the fork server was asked for."""
        self._making.append(child)

    def end_making(self, child: Child) -> bool:
        """Forget a child that was being made. Returns False if it was not made as a spare."""
        if child not in self._making:
            return False
        self._making.remove(child)
        return True

    def add(self, child: Child) -> None:
        """Take a spare that has a process."""
        self._waiting.append(child)

    def take(self, hostname: str) -> Child | None:
        """Take the spare that has this host name, or else the oldest one. None if none waits."""
        if not self._waiting:
            return None
        named = (each for each in self._waiting if each.host_name == hostname)
        spare = next(named, self._waiting[0])
        self._waiting.remove(spare)
        return spare

    def take_unmade(self) -> Child | None:
        """Take the spare that is being made. None if none is."""
        return self._making.popleft() if self._making else None

    def discard(self, child: Child) -> None:
        """Forget a spare that waits no more. Does nothing if the child is none."""
        if child in self._waiting:
            self._waiting.remove(child)
