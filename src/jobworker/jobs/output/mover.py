"""Moves one job's output to the spool while it runs, and reports if output cannot be kept.

Three bounds may cut the output of a job: the job's own limit, the limit on all output together, and
the disk. If it is the second one, the mover first asks retention to remove old output. After a cut
the rest of the output is discarded and counted. The mover reports the cut once (`tell_cut`), and
its caller decides whether the job goes on.
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
"""The pause before another attempt if the process had no file descriptor left."""
DRAIN_SECONDS = 2.0
"""How long the end of a job waits for its pipes if a process outside of it holds them open."""


@frozen(kw_only=True)
class OutputRoom:
    """The resources for output that the jobs of one owner share.

    The jobs of all owners share the same budget and the same pace.
    """

    owner: str
    budget: OutputBudget
    pace: OutputPace
    make_room: Callable[[], Awaitable[bool]]
    """Have retention remove old output now. Returns whether it removed any."""


@define(eq=False, kw_only=True)
class OutputMover:
    """Moves a job's output. `max_bytes` bounds the log; None is no bound."""

    _spool: Spool
    _max_bytes: int | None
    _room: OutputRoom
    _tell_cut: Callable[[OutputCut, str], None]
    _keep_cut: Callable[[], Awaitable[None]]
    """Stores the cut on the disk. Called before the first output is discarded for it."""
    _cut_before: OutputCut | None = field(alias="cut")
    """The cut that an earlier service has recorded; None without one. After a cut by the budget or
    the disk the log must not go on: it would have a gap."""
    _told: bool = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._told = self._cut_before is not None

    @asynccontextmanager
    async def moving(self, pipes: Mapping[Stream, int]) -> AsyncIterator[None]:
        """Move output during the block. After it, move the rest within `DRAIN_SECONDS`."""
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
            finally:  # also if cancelled: bytes beyond the limit may just have been discarded
                if pump.capped.is_set():
                    self._cut_at_limit()

    async def _move_all(self, pump: Pump) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_limit, pump)
            while not await self._settled(pump, pump.run):
                pass
            nursery.cancel_scope.cancel()

    async def _settled(self, pump: Pump, move: Callable[[], Awaitable[None]]) -> bool:
        """Call `move`. Returns True at its end, False after a refusal: then call it again.

        After a refusal either retention has made room, or output is discarded from now on.
        """
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
        """Have retention make room in the budget. Returns whether it could.

        While the service has no file descriptor left to look at old output, this waits, and the job
        waits too. Any other fault is logged, and the output is cut.
        """
        while True:
            try:
                return await self._room.make_room()
            except OutOfDescriptors:
                await trio.sleep(AGAIN_SECONDS)
            except JobworkerError as error:
                log.error("cannot make room for more output: %s", error)
                return False
            except Exception:
                log.exception("cannot make room for more output")
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
