"""The waiting room: jobs that wait for a place to run, in turns between their owners.

The jobs of one owner start in the order in which they came. Between owners, the next place goes to
the owner with the fewest running jobs, and among those to the one whose first job has waited
longest. So a tenant with a thousand jobs delays another tenant's first job only until the next
place is free.

The room is bounded. Its last tenth is for owners with only a few waiting jobs
(`model.fair_share`). It has no clock and no task.
"""

from collections import Counter, deque
from collections.abc import Iterator

from attrs import define, field

from jobworker.jobs.execution import Execution
from jobworker.model.fair_share import may_take_one_more


@define(eq=False)
class WaitingRoom:
    """The jobs that wait, and the number of running jobs of each owner."""

    _size: int
    _waiting: dict[str, deque[Execution]] = field(factory=dict, init=False)
    """The queue of each owner. No queue is empty."""
    _running: Counter[str] = field(factory=Counter, init=False)

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __contains__(self, execution: object) -> bool:
        return isinstance(execution, Execution) and execution in self._waiting.get(
            execution.record.owner, ()
        )

    def __iter__(self) -> Iterator[Execution]:
        return iter([each for queue in self._waiting.values() for each in queue])

    def has_room_for(self, owner: str, *, taken: int, arriving: int) -> bool:
        """Whether one more job of an owner may wait.

        `taken`: how many places of the room are in use, including those of jobs that are being
        admitted. `arriving`: how many jobs of this owner are being admitted.
        """
        mine = len(self._waiting.get(owner, ())) + arriving
        return may_take_one_more(self._size, taken=taken, mine=mine)

    def add(self, execution: Execution) -> None:
        """Add a job behind the other jobs of its owner."""
        self._waiting.setdefault(execution.record.owner, deque()).append(execution)

    def remove(self, execution: Execution) -> None:
        """Remove a job. Raises ValueError if it does not wait here."""
        owner = execution.record.owner
        queue = self._waiting.get(owner, deque())
        queue.remove(execution)
        if not queue:
            self._waiting.pop(owner, None)

    def next(self) -> Execution:
        """Remove and return the job whose turn it is. Raises IndexError if none waits."""
        if not self._waiting:
            raise IndexError("no job waits")
        owner = min(
            self._waiting,
            key=lambda each: (self._running[each], self._waiting[each][0].record.id),
        )
        execution = self._waiting[owner][0]
        self.remove(execution)
        return execution

    def started(self, owner: str) -> None:
        """Count a job of an owner as running."""
        self._running[owner] += 1

    def finished(self, owner: str) -> None:
        """Count one job of an owner less as running."""
        self._running[owner] -= 1
        if self._running[owner] <= 0:
            del self._running[owner]
