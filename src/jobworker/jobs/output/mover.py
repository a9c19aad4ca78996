"""One job's output while it runs: moved to the spool, and told of where it cannot be kept.

Three things end what is kept of a job: its own limit, the limit on all output together, and the
disk. Before the second does, retention is asked to make room. The rest is discarded and counted;
whether the job shall go on is for who hears of it (`tell_cut`, once).
"""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

import trio
from attrs import define, field, frozen

from jobworker.errors import JobworkerError, OutOfDescriptors, OutputError
from jobworker.jobs.output.budget import OutputBudget
from jobworker.jobs.output.pace import OutputPace
from jobworker.jobs.output.pump import Pump
from jobworker.jobs.output.spool import Spool
from jobworker.model.job import OutputCut, Stream
from jobworker.model.units import format_size

log = logging.getLogger("jobworker.jobs")

AGAIN_SECONDS = 1.0
DRAIN_SECONDS = 2.0
"""How long after a job's end someone outside of it may hold its pipes open."""


@frozen(kw_only=True)
class OutputRoom:
    """What an owner's jobs share: the budget, a way to win some of it back, and the processor.

    The budget and the processor are all other owners', too.
    """

    owner: str
    budget: OutputBudget
    pace: OutputPace
    make_room: Callable[[], Awaitable[bool]]
    """Remove what retention does not keep, now: whether there was any."""


@define(eq=False, kw_only=True)
class OutputMover:
    """Moves a job's output; `max_bytes` bounds what is kept, None does not."""

    _spool: Spool
    _max_bytes: int | None
    _room: OutputRoom
    _tell_cut: Callable[[OutputCut, str], None]
    _keep_cut: Callable[[], Awaitable[None]]
    """Have a disk know of the cut that was told: before anything is discarded for it."""
    _cut_before: OutputCut | None = field(alias="cut")
    """Why the log ends already, by an earlier service's word: it shall not go on after a gap."""
    _told: bool = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._told = self._cut_before is not None

    @asynccontextmanager
    async def moving(self, pipes: Mapping[Stream, int]) -> AsyncIterator[None]:
        """Move output during the block, and what is left of it within bounds thereafter."""
        with Pump(
            self._spool,
            pipes,
            max_bytes=self._max_bytes,
            budget=self._room.budget,
            pace=self._room.pace,
            owner=self._room.owner,
        ) as pump:
            if self._cut_before in (OutputCut.TOTAL, OutputCut.DISK):
                pump.discard()
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._move_all, pump)
                    yield
                    pump.hurry()
                    nursery.cancel_scope.deadline = trio.current_time() + DRAIN_SECONDS
                while not await self._settled(pump, pump.drain):
                    pass
            finally:  # a job that is left may just have discarded the first bytes
                if pump.capped.is_set():
                    self._cut_at_limit()

    async def _move_all(self, pump: Pump) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_limit, pump)
            while not await self._settled(pump, pump.run):
                pass
            nursery.cancel_scope.cancel()

    async def _settled(self, pump: Pump, move: Callable[[], Awaitable[None]]) -> bool:
        """Move output to its end (True), or until something is in the way that we could settle."""
        try:
            await move()
        except OutputError as error:
            if not (_cut_of(error) is OutputCut.TOTAL and await self._make_room()):
                self._cut_by(error)
                await self._keep_cut()
                pump.discard()
            return False
        return True

    async def _make_room(self) -> bool:
        """Win some of the budget back. The job waits while the service cannot even look.

        What else keeps the service from that is no fault of this job's, and cuts output as a full
        disk does.
        """
        while True:
            try:
                return await self._room.make_room()
            except OutOfDescriptors:
                await trio.sleep(AGAIN_SECONDS)
            except JobworkerError as error:
                log.error("no room could be made for more output: %s", error)
                return False
            except Exception:
                log.exception("no room could be made for more output")
                return False

    async def _watch_limit(self, pump: Pump) -> None:
        await pump.capped.wait()
        self._cut_at_limit()

    def _cut_at_limit(self) -> None:
        limit = format_size(self._max_bytes or 0)
        self._cut(OutputCut.LIMIT, f"its output reached the limit of {limit}")

    def _cut_by(self, error: OutputError) -> None:
        self._cut(_cut_of(error), str(error))

    def _cut(self, cut: OutputCut, why: str) -> None:
        if not self._told:
            self._told = True
            self._tell_cut(cut, why)


def _cut_of(error: OutputError) -> OutputCut:
    return OutputCut(error.data.get("cut", OutputCut.DISK.value))
