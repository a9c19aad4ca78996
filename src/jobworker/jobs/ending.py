"""How a job is brought to its end: who asked for it, with what signals, and how long it has.

A stop, the time-out and the policy for output all ask in the same way: a signal, a grace period,
and then SIGKILL for all that is left. The earliest deadline counts, and each signal is delivered.
A job that would not even notice the signal is killed at once (`sandbox.launcher_jobs.deliver`).
What was asked for first decides what is said of the end.
"""

import logging
import math
import signal
from contextlib import suppress

import trio
from attrs import define, field

from jobworker.errors import JobworkerError
from jobworker.model.job import JobId
from jobworker.model.lifecycle import Event, Reason
from jobworker.sandbox.launch import Exit
from jobworker.sandbox.link import Link

log = logging.getLogger("jobworker.jobs")

MAX_PENDING_SIGNALS = 64


@define(eq=False, kw_only=True)
class Ending:
    """What was asked for of one job, and the task that sees to it (`serve`)."""

    _job: JobId
    _link: Link
    _grace_seconds: float
    """What a request that names no grace period gives."""
    stopping: bool = field(default=False, init=False)
    """Whether somebody asked for the job's end."""
    timed_out: bool = field(default=False, init=False)
    out_of_output: bool = field(default=False, init=False)
    """Whether it is ended for having written too much."""
    _grace: trio.CancelScope = field(factory=trio.CancelScope, init=False)
    _signals: trio.MemorySendChannel[signal.Signals] = field(init=False)
    _wanted: trio.MemoryReceiveChannel[signal.Signals] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._signals, self._wanted = trio.open_memory_channel(MAX_PENDING_SIGNALS)

    @property
    def under_way(self) -> bool:
        """Whether anything has asked for the end."""
        return self.stopping or self.timed_out or self.out_of_output

    def stop(self, number: signal.Signals, grace_seconds: float | None) -> None:
        """Somebody wants the job to end."""
        self.stopping = True
        self._ask(number, grace_seconds)

    def stop_for_output(self) -> None:
        """The policy for output wants the job to end."""
        self.out_of_output = not self.stopping
        self._ask(signal.SIGTERM, None)

    async def time_out(self, seconds: float | None) -> None:
        """Ask for the end after so many seconds; None or 0 is never."""
        await trio.sleep(math.inf if not seconds else max(0.0, seconds))
        self.timed_out = not self.stopping
        self._ask(signal.SIGTERM, None)

    def _ask(self, number: signal.Signals, grace_seconds: float | None) -> None:
        grace = self._grace_seconds if grace_seconds is None else grace_seconds
        self._grace.deadline = min(self._grace.deadline, trio.current_time() + grace)
        # It may have been told often enough, or have ended.
        with suppress(trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
            self._signals.send_nowait(number)

    async def serve(self) -> None:
        """Deliver signals as they are asked for, and kill at the end of the grace period."""
        with self._grace:
            async for number in self._wanted:
                try:
                    delivered = await self._link.signal(self._job, number)
                except JobworkerError:
                    return  # it has ended
                if not delivered:
                    break  # it would not even notice: waiting for it is in vain
        try:
            await self._link.kill(self._job)
        except JobworkerError as error:
            log.debug("job %d: %s", self._job, error)

    def verdict(self, ending: Exit | None) -> tuple[Event, Reason | None]:
        """What is said of an end; None is a launcher that went under the job."""
        if self.stopping and ending is not None and not self.timed_out:
            return Event.STOP, None
        reason = self._reason(ending)
        return (Event.SUCCEED, None) if reason is None else (Event.FAIL, reason)

    def _reason(self, ending: Exit | None) -> Reason | None:
        if ending is None:
            return Reason.LOST
        for reason, applies in (
            (Reason.TIMEOUT, self.timed_out),
            (Reason.OUTPUT, self.out_of_output),
            (Reason.OOM, ending.usage.oom_kills > 0),
            (Reason.SIGNAL, ending.signal is not None),
            (Reason.EXIT, bool(ending.code)),
        ):
            if applies:
                return reason
        return None

    def close(self) -> None:
        """The job has ended: whoever asks now asks in vain."""
        self._signals.close()
        self._wanted.close()
