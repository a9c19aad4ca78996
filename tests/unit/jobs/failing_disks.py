"""Disks that refuse, for a service whose threads run as tasks: all of it on Trio's clock.

The files are real. What a thread would do, a task does at once; so the mock clock never jumps over
work that is under way, and the order of everything is Trio's.
"""

import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Literal, TypeVar, TypeVarTuple

import apsw
import pytest
import trio
from attrs import define, field

from jobworker.jobs.history import writer as history_writer
from jobworker.jobs.history.writer import Work, Writer, _Write

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")

HistoryFault = Literal["", "slow", "locked", "broken", "full", "full for what is new"]
SLOW_SECONDS = 3.0

OutputFault = Literal["", "full", "lost"]


@define(eq=False)
class Disks:
    """What the disks refuse at the moment."""

    history: HistoryFault = ""
    output_is_full: bool = False
    """Whether no file of the spool can grow. What it has room for already can be written."""
    output_is_lost: bool = False
    """Whether fdatasync(2) fails."""
    output_was_full: bool = False
    """Whether something was refused for that."""

    def mend(self) -> None:
        """Let all disks take everything again."""
        self.history, self.output_is_full, self.output_is_lost = "", False, False

    def change_output(self, fault: OutputFault) -> None:
        """Have the disk of the output refuse what is new, or to say that it has something."""
        self.output_is_full, self.output_is_lost = fault == "full", fault == "lost"

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Let the test itself write, during the block."""
        was_full, self.output_is_full = self.output_is_full, False
        try:
            yield
        finally:
            self.output_is_full = was_full

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Stand between this process and its disks, and between its tasks and their threads."""
        patch.setattr(trio.to_thread, "run_sync", _run_at_once)
        patch.setattr(
            "jobworker.jobs.history.history.Writer", lambda *parts: TaskWriter(*parts, disks=self)
        )
        patch.setattr("jobworker.jobs.history.reserved_space.PAGES", 8)
        for module in ("job_ends", "job_reports"):
            clock = SimpleNamespace(monotonic=trio.current_time, time=time.time)
            patch.setattr(f"jobworker.sandbox.service.{module}.time", clock)
        for name in ("splice", "pwrite", "mkdir", "fdatasync"):
            patch.setattr(os, name, getattr(self, f"_{name}")(getattr(os, name)))

    def _splice(self, real: Callable[..., int]) -> Callable[..., int]:
        def splice(*arguments: int, **more: int) -> int:
            self._refuse_to_grow()
            return real(*arguments, **more)

        return splice

    def _pwrite(self, real: Callable[..., int]) -> Callable[..., int]:
        def pwrite(file: int, data: bytes, offset: int) -> int:
            room = os.fstat(file).st_size - offset
            if len(data) > room:
                if self.output_is_full and room > 0:
                    return real(file, data[:room], offset)  # the rest is refused
                self._refuse_to_grow()
            return real(file, data, offset)

        return pwrite

    def _mkdir(self, real: Callable[..., None]) -> Callable[..., None]:
        def mkdir(*arguments: object, **more: object) -> None:
            self._refuse_to_grow()
            real(*arguments, **more)

        return mkdir

    def _fdatasync(self, _: object) -> Callable[[int], None]:
        def fdatasync(_: int) -> None:
            if self.output_is_lost:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        return fdatasync

    def _refuse_to_grow(self) -> None:
        if self.output_is_full:
            self.output_was_full = True
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@define(eq=False)
class TaskWriter(Writer):
    """The history's writer without a thread: whoever comes first commits what all wait for."""

    _disks: Disks = field(kw_only=True)
    _turn: trio.StrictFIFOLock = field(factory=trio.StrictFIFOLock, init=False)

    def __attrs_post_init__(self) -> None:
        """Start no thread."""

    async def write(
        self, work: Work, *, is_new: bool = False, if_refused: Callable[[], None] | None = None
    ) -> None:
        """As the writer that this stands for."""
        write = _Write(work, is_new, if_refused)
        self._waiting.append(write)
        with trio.CancelScope(shield=True):
            async with self._turn:
                if write in self._waiting:
                    await self._commit_all()
            await write.done.wait()
        if write.fault is not None:
            raise write.fault

    async def _commit_all(self) -> None:
        seconds = {"slow": SLOW_SECONDS, "locked": history_writer.BUSY_SECONDS}
        batch = list(self._waiting)
        self._waiting.clear()
        await trio.sleep(seconds.get(self._disks.history, 0))
        for write, fault in zip(batch, self._commit(batch), strict=True):
            write.finish(fault)

    def _commit(self, batch: Sequence[_Write]) -> list[BaseException | None]:
        if self._disks.history == "locked":
            return [apsw.BusyError("database is locked")] * len(batch)
        return super()._commit(batch)

    def _has_room(self) -> bool:
        return not self._disks.history.startswith("full") and super()._has_room()

    def _attempt(self, batch: Sequence[_Write]) -> BaseException | None:
        if self._disks.history == "broken":  # no transaction can be begun
            return apsw.IOError("disk I/O error")
        if self._disks.history != "full":
            return super()._attempt(batch)

        def refuse(_: apsw.Connection) -> None:
            raise apsw.FullError("database or disk is full")

        return super()._attempt([*batch, _Write(refuse)])

    def close(self) -> None:
        """Close the connection; nothing waits."""
        assert not self._waiting
        self._files.close(self._connection)


async def _run_at_once(
    work: Callable[[*Arguments], T],
    *arguments: *Arguments,
    limiter: trio.CapacityLimiter,
    **_: object,
) -> T:
    """Stand for `trio.to_thread.run_sync`."""
    await trio.lowlevel.checkpoint_if_cancelled()
    place = object()
    await limiter.acquire_on_behalf_of(place)
    try:
        await trio.lowlevel.cancel_shielded_checkpoint()
        return work(*arguments)
    finally:
        limiter.release_on_behalf_of(place)
