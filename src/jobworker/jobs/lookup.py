"""Jobs as they are looked up: live ones from memory, ended ones from history and archive, as one.

A live job's record in the history is older than the one in memory, or tells of an end that may not
be told yet, so the one in memory is shown. Pure but for the spool that is searched.
"""

from collections.abc import Collection, Iterable, Mapping

import trio

from jobworker.jobs.execution import Execution
from jobworker.jobs.history.search import MAX_PAGE_BYTES, Filter, Page
from jobworker.jobs.output.follower import Follower
from jobworker.jobs.output.search import Start
from jobworker.jobs.output.spool import Spool, as_of_now
from jobworker.model.job import JobId, JobRecord, Stream
from jobworker.model.summary import summarize
from jobworker.serialization.convert import unstructure
from jobworker.serialization.json_text import dumps

LIVE_AT_A_TIME = 20
"""Live records that are made into JSON before others get their turn: under a millisecond."""


async def page_of(
    live: Mapping[JobId, Execution], stored: Page, wanted: Filter, limit: int
) -> Page:
    """At most `limit` summaries, newest first, of live jobs and of a page of the history."""
    floor = stored.next or 0  # what is older belongs to a later page
    seen = [e for e in live.values() if e.record.id >= floor and wanted.fits(e.record)]
    merged: dict[int, tuple[JobRecord, Spool] | str] = dict(stored.records)
    for job in live:  # its record in memory says whether it fits
        merged.pop(job, None)
    # As they were when they fitted: they may end before others have had their turn.
    merged.update((each.record.id, (each.record, each.spool)) for each in seen)
    found, size = list[tuple[int, str]](), 0
    for number in sorted(merged, reverse=True)[:limit]:
        one = merged[number]
        if not isinstance(one, str):
            one = dumps(unstructure(summarize(as_of_now(*one))))
            if len(found) % LIVE_AT_A_TIME == 0:
                await trio.lowlevel.checkpoint()
        found.append((number, one))
        size += len(one)
        if size > MAX_PAGE_BYTES:
            break
    return Page(found, found[-1][0] if len(found) < len(merged) else stored.next)


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


def output_of(executions: Iterable[Execution]) -> int:
    """Bytes of what has ended and is not in the archive yet."""
    ended = [each for each in executions if each.ended.is_set()]
    records = [each.record for each in ended if not each.archived.is_set()]
    return sum(each.stdout_bytes + each.stderr_bytes for each in records)
