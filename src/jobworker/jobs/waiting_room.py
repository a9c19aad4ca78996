"""The waiting room: jobs that wait for a place to run, in turns between their owners.

Within one owner's jobs the first come is the first served. Between owners the next place goes to
the one who has the fewest jobs running, and among those to the one who has waited longest. So a
tenant with a thousand jobs delays another's first one by no more than the next free place.

The room is bounded, and its last tenth is for owners who have only a few jobs waiting
(`model/fair_share.py`).

Pure but for what it holds: no clock, no task.
"""

from collections import Counter, deque
from collections.abc import Iterator

from attrs import define, field

from jobworker.jobs.execution import Execution
from jobworker.model.fair_share import may_take_one_more


@define(eq=False)
class WaitingRoom:
    """Jobs that wait, and how many each owner has running."""

    _size: int
    _waiting: dict[str, deque[Execution]] = field(factory=dict, init=False)
    """By owner; nobody has an empty queue."""
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

        `taken` places of the room are taken, those of jobs included that are on their way in;
        `arriving` of these are the owner's.
        """
        mine = len(self._waiting.get(owner, ())) + arriving
        return may_take_one_more(self._size, taken=taken, mine=mine)

    def add(self, execution: Execution) -> None:
        """Have a job wait, behind the others of its owner."""
        self._waiting.setdefault(execution.record.owner, deque()).append(execution)

    def remove(self, execution: Execution) -> None:
        """Have a job wait no longer. Raises ValueError where it does not."""
        owner = execution.record.owner
        queue = self._waiting.get(owner, deque())
        queue.remove(execution)
        if not queue:
            self._waiting.pop(owner, None)

    def next(self) -> Execution:
        """Take out the job whose turn it is. Raises IndexError where none waits."""
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
        """Count it no longer."""
        self._running[owner] -= 1
        if self._running[owner] <= 0:
            del self._running[owner]
