"""The values of a job's secret variables, from its admission to its start: in memory alone.

A thousand jobs may wait with a megabyte each. As objects these would take five times that, so they
are kept as one text; and those that wait together have a bound, in all and for each owner.
"""

from collections.abc import Iterable, Mapping

import trio
from attrs import define, field

from jobworker.errors import Busy
from jobworker.model.units import format_size
from jobworker.serialization.json_pieces import batches_of
from jobworker.serialization.json_text import dumps, loads

SMALL_BYTES = 4096
"""Those of a job that are not counted: a thousand such jobs need no bound."""
MAX_BYTES = 32 << 20
MAX_OWNER_BYTES = 8 << 20


@define(eq=False)
class Secrets:
    """One job's."""

    _pieces: list[str] = field(factory=list, repr=False)
    """Objects of JSON; together they have all of the variables."""

    @classmethod
    async def of(cls, variables: Mapping[str, str]) -> "Secrets":
        """Those of a request; others get their turns."""
        pieces = []
        for batch in batches_of(variables):
            pieces.append(dumps(batch))
            await trio.lowlevel.checkpoint()
        return cls(pieces)

    @property
    def size(self) -> int:
        """How much of the bound they take."""
        size = sum(map(len, self._pieces))
        return size if size > SMALL_BYTES else 0

    def drop(self) -> None:
        """Keep nothing of them: the job has started."""
        self._pieces = []

    async def values(self) -> Mapping[str, str]:
        """The variables, for the job's start; others get their turns."""
        found = dict[str, str]()
        for piece in self._pieces:
            found.update(loads(piece))  # type: ignore[call-overload]
            await trio.lowlevel.checkpoint()
        return found


def check_room(mine: Secrets, waiting: Iterable[tuple[bool, Secrets]]) -> None:
    """Raise Busy where one more job's secrets go beyond the bounds.

    `waiting` has those of the jobs that wait, each with whether they are of the same owner.
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
            remedy="try again when some have started, or have the job fetch what is large",
        )
