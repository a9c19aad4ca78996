"""The values of a job's secret variables, from its admission to its start. Only memory has them.

A thousand jobs may wait with a megabyte of secrets each. Python's objects would take five times
that, so secrets are kept as JSON text. The secrets of all waiting jobs together have a bound, and
so have those of each owner.
"""

from collections.abc import Iterable, Mapping

import trio
from attrs import define, field

from jobworker.errors import Busy
from jobworker.model.units import format_size
from jobworker.serialization.json_pieces import batches_of
from jobworker.serialization.json_text import dumps, loads

SMALL_BYTES = 4096
"""The secrets of a job up to this size are not counted: a thousand such jobs need no bound."""
MAX_BYTES = 32 << 20
"""The bound on the secrets of all waiting jobs, in characters of JSON."""
MAX_OWNER_BYTES = 8 << 20
"""The bound on the secrets of one owner's waiting jobs."""


@define(eq=False)
class Secrets:
    """The secret variables of one job."""

    _pieces: list[str] = field(factory=list, repr=False)
    """JSON objects, each with some of the variables."""

    @classmethod
    async def of(cls, variables: Mapping[str, str]) -> "Secrets":
        """Take the secret variables of a request. Other tasks get their turns meanwhile."""
        pieces = []
        for batch in batches_of(variables):
            pieces.append(dumps(batch))
            await trio.lowlevel.checkpoint()
        return cls(pieces)

    @property
    def size(self) -> int:
        """How much of the bounds these secrets take; 0 up to `SMALL_BYTES`."""
        size = sum(map(len, self._pieces))
        return size if size > SMALL_BYTES else 0

    def drop(self) -> None:
        """Forget the variables: the job has started."""
        self._pieces = []

    async def values(self) -> Mapping[str, str]:
        """Return the variables, for the job's start. Other tasks get their turns meanwhile."""
        found = dict[str, str]()
        for piece in self._pieces:
            found.update(loads(piece))  # type: ignore[call-overload]
            await trio.lowlevel.checkpoint()
        return found


def check_room(mine: Secrets, waiting: Iterable[tuple[bool, Secrets]]) -> None:
    """Raise Busy if the secrets of one more job exceed the bounds.

    `waiting`: the secrets of each waiting job, and whether the job has the same owner.
    """
    if not mine.size:
        return
    own, every = mine.size, mine.size
    for is_own, each in waiting:
        every += each.size
        own += each.size * is_own
    if every > MAX_BYTES or own > MAX_OWNER_BYTES:
        bound, whose = (MAX_OWNER_BYTES, "your") if own > MAX_OWNER_BYTES else (MAX_BYTES, "all")
        raise Busy(
            f"cannot run the command: the secret variables of {whose} waiting jobs are kept in "
            f"memory, and with these they would have more than {format_size(bound)}",
            remedy="try again when some jobs have started, or have the job fetch large secrets",
        )
