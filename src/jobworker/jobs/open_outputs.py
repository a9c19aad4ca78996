"""The outputs of ended jobs that are open to be read: so many at most, shared between owners.

Each open output has three descriptors. All followers of a job share one. If the bound is reached,
the owner with the most open outputs loses one, so no owner keeps the others from reading.
"""

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

from attrs import define, field

from jobworker.errors import TooManyFollows
from jobworker.jobs.output.spool import Spool
from jobworker.model.job import JobId, JobRecord


@define(eq=False)
class OpenOutputs:
    """The open outputs of ended jobs, at most `max_open`."""

    _max_open: int
    _open: dict[JobId, Spool] = field(factory=dict, init=False)
    """The spools that are being read, one for all followers of a job."""
    _owners: dict[object, str] = field(factory=dict, init=False)
    """The owner of each spool that counts towards `_max_open`: of `_open`, of those that are being
    opened, and of those that followers have read since before the job's end."""

    @asynccontextmanager
    async def reading(
        self, record: JobRecord, open_spool: Callable[[], Awaitable[Spool]]
    ) -> AsyncIterator[Spool]:
        """Open an ended job's output, for the block and as long as a follower reads it.

        If `_max_open` outputs are open, the owner with the most loses one, provided that it has at
        least two more than this job's owner. Raises TooManyFollows if no output can be closed, and
        whatever `open_spool` raises.
        """
        spool = self._open.get(record.id)
        if spool is None or record.output_removed_at is not None:
            self._check_room(record)
            place = object()
            self._owners[place] = record.owner
            try:
                spool = self._share(record, await open_spool())
            finally:
                del self._owners[place]
        with spool.in_use():
            yield spool

    def _share(self, record: JobRecord, spool: Spool) -> Spool:
        """Share a spool that was just opened. Returns another task's, if that was faster."""
        if (other := self._open.get(record.id)) is not None:
            spool.close()
            return other
        self._open[record.id] = spool
        self._owners[spool] = record.owner

        def let_go() -> None:
            del self._open[record.id]
            del self._owners[spool]

        spool.lend(let_go)
        return spool

    def count_followed(self, spool: Spool, owner: str) -> None:
        """Count the open files of a job that has just ended, as long as followers read them."""
        if spool.has_files:
            self._owners[spool] = owner
            spool.lend(partial(self._owners.__delitem__, spool))
            while len(self._owners) > self._max_open and self._shut_one(least=0):
                pass

    def _check_room(self, record: JobRecord) -> None:
        """Make room for one more open output. Raises TooManyFollows."""
        if len(self._owners) >= self._max_open:
            own = sum(owner == record.owner for owner in self._owners.values())
            self._shut_one(least=own + 2)
        if len(self._owners) >= self._max_open:
            raise TooManyFollows(
                f"cannot read the output of job {record.id}: the output of {self._max_open} "
                "ended jobs is being read, as many as this service has descriptors for",
                remedy="try again later, or raise the service's LimitNOFILE",
            )

    def _shut_one(self, *, least: int) -> bool:
        """Close one output of the owner with the most open ones, if these are at least `least`.

        Of these it closes the one that was read least recently (`Spool.shut_out`). Returns whether
        it closed one.
        """
        # An output that was closed while a thread reads it keeps its descriptors until the thread
        # is done. Its owner has lost it already.
        left = [each for each in self._owners if not (isinstance(each, Spool) and each.shut)]
        numbers = Counter(self._owners[each] for each in left)
        shown = [each for each in left if isinstance(each, Spool)]
        if not shown or max(numbers.values()) < least:
            return False
        victim = min(shown, key=lambda each: (-numbers[self._owners[each]], each.read_at))
        if numbers[self._owners[victim]] < least:
            return False
        victim.shut_out()
        return True
