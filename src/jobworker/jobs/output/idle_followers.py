"""The idle followers of one spool: they have read everything and wait to be woken."""

from collections import deque

from attrs import define, field

from jobworker.jobs.output.batched_wakeups import AT_A_TIME, run_in_batches
from jobworker.jobs.output.follower import Follower


@define(eq=False)
class IdleFollowers:
    """The idle followers, and those that are about to be woken, a few in each turn of the loop."""

    _idle: set[Follower] = field(factory=set, init=False)
    _to_poke: deque[Follower] = field(factory=deque, init=False)
    _poking: bool = field(default=False, init=False)

    def __len__(self) -> int:
        return len(self._idle) + len(self._to_poke)

    def add(self, follower: Follower) -> None:
        """Count a follower as idle. The next `wake` wakes it, once."""
        self._idle.add(follower)

    def discard(self, follower: Follower) -> None:
        """Undo `add`, if the follower is not about to be woken."""
        self._idle.discard(follower)

    def wake(self) -> None:
        """Wake all idle followers."""
        self._to_poke.extend(self._idle)
        self._idle.clear()
        if not self._poking:
            self._poking = True
            run_in_batches(self._poke_some)

    def _poke_some(self) -> bool:
        for _ in range(min(AT_A_TIME, len(self._to_poke))):
            self._to_poke.popleft().poke()
        self._poking = bool(self._to_poke)
        return self._poking
