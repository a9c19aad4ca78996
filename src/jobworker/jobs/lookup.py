"""Jobs as they are looked up: live ones from memory, ended ones from history and archive, as one.

A live job's record in the history is older than the one in memory, so that one is shown. Pure but
for the spool that is searched.
"""

from collections.abc import Collection, Iterable, Mapping

from attrs import evolve, frozen

from jobworker.jobs.execution import Execution
from jobworker.jobs.follower import Follower
from jobworker.jobs.output_search import Start
from jobworker.jobs.spool import Spool
from jobworker.model.job import JobId, JobRecord, Stream
from jobworker.model.lifecycle import State


@frozen(kw_only=True)
class Filter:
    """Which records are wanted: those that fit all of this."""

    states: Collection[State]
    owner: str | None = None
    labels: Mapping[str, str] | None = None
    before: int | None = None
    """Ids below this one."""

    def fits(self, record: JobRecord) -> bool:
        """Whether a record is wanted."""
        return (
            record.state in self.states
            and self.owner in (None, record.owner)
            and (self.labels or {}).items() <= record.spec.labels.items()
            and (self.before is None or record.id < self.before)
        )


def page_of(
    live: Mapping[JobId, Execution], stored: list[JobRecord], wanted: Filter, limit: int
) -> list[JobRecord]:
    """At most `limit` records, newest first, of live jobs and of a page of the history."""
    seen = [each.record for each in live.values() if wanted.fits(each.record)]
    if stored:  # a page that ended early must not pass over any: see below its last
        seen = [record for record in seen if record.id >= stored[-1].id]
    shown = [with_sizes(live[record.id]) for record in seen]
    merged = shown + [record for record in stored if record.id not in live]
    return sorted(merged, key=lambda record: record.id, reverse=True)[:limit]


def with_sizes(execution: Execution) -> JobRecord:
    """A live job's record with what it has written so far."""
    sizes = execution.spool.statistics()
    return evolve(
        execution.record,
        stdout_bytes=sizes.stdout_bytes,
        stderr_bytes=sizes.stderr_bytes,
        discarded_bytes=sizes.discarded_bytes,
    )


async def follow_from(
    spool: Spool, start: Start, streams: Collection[Stream], coalesce: bool
) -> Follower:
    """A follower that begins where `start` says. Raises as `Spool.follow` and `find_start` do.

    The search is the follower's own: the job may end meanwhile and its execution close the spool,
    which then stays open for this follower.
    """
    follower = spool.follow(streams=streams, coalesce=coalesce)
    try:
        follower.begin(await spool.find_start(start, streams))
    except BaseException:
        follower.close()
        raise
    return follower


def output_of(executions: Iterable[Execution], jobs: Collection[JobId]) -> int:
    """Bytes of those among `jobs` that have ended and are not in the archive yet."""
    ended = [each for each in executions if each.ended.is_set()]
    records = [each.record for each in ended if not each.archived.is_set()]
    return sum(each.stdout_bytes + each.stderr_bytes for each in records if each.id in jobs)
