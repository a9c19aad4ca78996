"""Jobs as they are looked up: what is in memory beside what the history has."""

from datetime import UTC, datetime
from pathlib import Path

import trio
from attrs import define, evolve

from jobworker.jobs.execution import Execution
from jobworker.jobs.history.search import Filter, Page
from jobworker.jobs.live_record import LiveRecord
from jobworker.jobs.lookup import LIVE_AT_A_TIME, page_of
from jobworker.jobs.output.spool import Spool
from jobworker.model.job import JobId
from jobworker.model.lifecycle import State

from ..strategies import record
from .supervised import RULES


@define
class Asked:
    """The state RUNNING, and whether somebody has asked for it."""

    event: trio.Event

    def __contains__(self, state: object) -> bool:
        self.event.set()
        return state is State.RUNNING


def running(job: int, spool: Path) -> Execution:
    return Execution(
        live_record=LiveRecord(
            record=record(job, State.RUNNING),
            spool=Spool.create(spool / str(job)),
            history=None,  # type: ignore[arg-type]
            clock=lambda: datetime.now(UTC),
        ),
        launcher=None,  # type: ignore[arg-type]
        rules=RULES,
        room=None,  # type: ignore[arg-type]
        admitted_at_once=True,
    )


async def test_page_of_those_that_run_has_none_that_ended_while_it_was_made(
    tmp_path: Path,
) -> None:
    live = {JobId(job): running(job, tmp_path) for job in range(1, 5 * LIVE_AT_A_TIME)}
    asked = trio.Event()

    async def end() -> None:
        await asked.wait()
        for each in live.values():
            each.live_record.record = evolve(each.record, state=State.COMPLETED)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(end)
        wanted = Filter(states=Asked(asked))  # type: ignore[arg-type]
        page = await page_of(live, Page([], None), wanted, 1000)
    assert all('"state":"RUNNING"' in text for _, text in page.records)
    assert len(page.records) == len(live)
    for each in live.values():
        each.spool.close()
