"""Programs that a played launcher runs: pipes of the kernel, and an end when a test says so."""

import os
from typing import Literal

import trio
from attrs import define, field

from jobworker.model.job import JobId, Usage
from jobworker.sandbox.cgroup.accounting import Want
from jobworker.sandbox.channel import close_all
from jobworker.sandbox.protocol.end_requests import EndRequestLog
from jobworker.sandbox.service.job_reports import JobExit

Start = Literal["runs", "refused", "lacks processes", "hangs", "may have run"]
OnSignal = Literal["exits", "goes on", "has no handler"]


@define(kw_only=True)
class Behaviour:
    """What the program of one request does."""

    starts: list[Start]
    """How its starts go, in turn; further ones succeed."""
    on_signal: OnSignal
    timeout_seconds: float = 0.0


@define(eq=False)
class Program:
    """A job whose program was executed."""

    job: JobId
    request: str
    on_signal: OnSignal
    reads: tuple[int, int]
    writes: list[int]
    since: float = field(factory=trio.current_time)
    wrote: tuple[bytearray, bytearray] = field(factory=lambda: (bytearray(), bytearray()))
    asked: EndRequestLog | None = None
    exit: JobExit | None = None
    cause: str = ""
    """Why it was asked to end, where that was before its end."""
    lost: bool = False
    """Whether its launcher died before it was told to forget it."""
    may_only_have_run: bool = False
    """Whether the service could not take its pipes, and had it removed."""

    def write(self, stream: int, count: int) -> None:
        """Write `count` bytes, each of which tells its place, or what the pipe has room for."""
        begin = len(self.wrote[stream])
        data = bytes(place % 251 for place in range(begin, begin + count))
        try:
            written = os.write(self.writes[stream], data)
        except BlockingIOError:
            return
        self.wrote[stream].extend(data[:written])

    def end(self, code: int | None, number: int | None, want: Want) -> None:
        """Be gone, with all that could write to the pipes."""
        close_all(self.writes)
        self.writes = []
        self.cause = self.asked.cause if self.asked else ""
        now = trio.current_time()
        self.exit = JobExit(code=code, signal=number, usage=Usage(), want=want, ended_at=now)
