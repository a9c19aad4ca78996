"""Functions of the supervisor's look-ups, which find live jobs in memory and others in the history.

The record in memory of a live job counts. The history's record of it is older, or has an end that
no client may know yet. No I/O here but the search in a spool.
"""

from collections.abc import Collection, Iterable, Mapping

import trio

from jobworker.jobs.execution import Execution
from jobworker.jobs.history.search import MAX_PAGE_BYTES, Filter, Page
from jobworker.jobs.output.follower import Follower
from jobworker.jobs.output.search import Start
from jobworker.jobs.output.sizes import as_of_now
from jobworker.jobs.output.spool import Spool
from jobworker.model.job import JobId, JobRecord, Stream
from jobworker.model.summary import summarize
from jobworker.serialization.convert import unstructure
from jobworker.serialization.json_text import dumps

LIVE_AT_A_TIME = 20
"""The number of live records that become JSON in one turn of the event loop, in less than 1 ms."""


async def page_of(
    live: Mapping[JobId, Execution], stored: Page, wanted: Filter, limit: int
) -> Page:
    """Return a page of at most `limit` summaries, newest first, of live jobs and of `stored`.

    `stored`: the page of the history for the same search.
    """
    floor = stored.next or 0  # older jobs belong to a later page
    seen = [e for e in live.values() if e.record.id >= floor and wanted.fits(e.record)]
    merged: dict[int, tuple[JobRecord, Spool] | str] = dict(stored.records)
    for job in live:  # the history's record of a live job is out of date
        merged.pop(job, None)
    # Keep the records as they fitted: jobs may end while other tasks have their turns.
    merged.update((each.record.id, (each.record, each.spool)) for each in seen)
    found, size = list[tuple[int, str]](), 0
    for number in sorted(merged, reverse=True)[:limit]:
        one = merged[number]
        if not isinstance(one, str):
            record, spool = one
            one = dumps(unstructure(summarize(as_of_now(record, spool.statistics()))))
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
    """Return a follower that begins where `start` says. Raises as `follow` and `find_start` do.

    The follower exists before the search: if the job ends meanwhile and its execution closes the
    spool, the files stay open for this follower.
    """
    follower = spool.follow(streams=streams, coalesce=coalesce)
    try:
        follower.begin(await spool.find_start(start, streams))
    except BaseException:
        follower.close()
        raise
    return follower


def output_of(executions: Iterable[Execution]) -> int:
    """The bytes of output of those of `executions` that have ended and are not in the archive."""
    ended = [each for each in executions if each.ended.is_set()]
    records = [each.record for each in ended if not each.archived.is_set()]
    return sum(each.stdout_bytes + each.stderr_bytes for each in records)
