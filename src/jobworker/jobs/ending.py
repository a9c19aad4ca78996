"""How a job is brought to its end: who asked for it, with what signals, and how long it has.

A stop, the time-out and the policy for output all ask in the same way: a signal, a grace period,
and then SIGKILL for all that is left. The earliest deadline counts, and each signal is delivered.
A job that would not even notice the signal is killed at once (`sandbox.launcher.jobs.deliver`).

What is said of an end is the cause that came first. Whoever asks second, or asks for the end of a
job that has exited (its output may still be on its way), changes nothing about that.

The cause and the deadline go to the launcher together with the signal
(`sandbox.protocol.end_requests`), and no disk is asked before. So the next service knows both
(`resume`): it sends no signal of its own, and kills when this one would have done so. A client
whose connection broke asks it for the same stop again; for a while a signal that the job has got
already is not sent a second time.
"""

import errno
import logging
import math
import signal
from collections.abc import Callable
from contextlib import suppress
from enum import Enum

import trio
from attrs import define, field

from jobworker.errors import JobworkerError, LauncherGone, LauncherSilent, NotFound
from jobworker.model.job import KILLED_FOR_MEMORY, JobId
from jobworker.model.lifecycle import Event, Reason
from jobworker.sandbox.protocol.end_requests import OUTPUT, STOP, TIMEOUT, EndRequest
from jobworker.sandbox.service.job_reports import EarlierEndRequest, JobExit
from jobworker.sandbox.service.launcher_client import LauncherClient

log = logging.getLogger("jobworker.jobs")

MAX_PENDING_SIGNALS = 64
_MAX_GRACE_SECONDS = 1e12
"""What the launcher counts, in milliseconds."""
KILL_AGAIN_SECONDS = 1.0
REPEATS_SECONDS = 120.0
"""How long after a restart a stop by the same signal is taken for the earlier one, asked for again:
a client that lost its connection does so as soon as it has another."""


def _tell_nobody() -> None:
    pass


class _Cause(Enum):
    """Who asked for an end."""

    STOP = STOP
    TIMEOUT = TIMEOUT
    OUTPUT = OUTPUT


@define(eq=False, kw_only=True)
class Ending:
    """What was asked for of one job, and the task that sees to it (`serve`)."""

    _job: JobId
    _launcher: LauncherClient
    _grace_seconds: float
    """What a request that names no grace period gives."""
    _told: Callable[[], None] = _tell_nobody
    """Called when the launcher was told of what was asked for, or could not be."""
    exited: bool = field(default=False, init=False)
    """Whether its end is known: what is asked for now is too late."""
    stopping: bool = field(default=False, init=False)
    """Whether somebody asked for the job's end while it ran."""
    _cause: _Cause | None = field(default=None, init=False)
    """What was asked for first."""
    _reached: bool = field(default=False, init=False)
    """Whether a signal reached the job for it; else it ended by itself meanwhile."""
    _sent_before: frozenset[int] = field(default=frozenset(), init=False)
    """Signals that an earlier service has sent."""
    _repeats_until: float = field(default=-math.inf, init=False)
    _grace: trio.CancelScope = field(factory=trio.CancelScope, init=False)
    _signals: trio.MemorySendChannel[signal.Signals] = field(init=False)
    _wanted: trio.MemoryReceiveChannel[signal.Signals] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._signals, self._wanted = trio.open_memory_channel(MAX_PENDING_SIGNALS)

    @property
    def under_way(self) -> bool:
        """Whether anything has asked for the end of the job while it ran."""
        return self._cause is not None

    def stop(self, number: signal.Signals, grace_seconds: float | None) -> None:
        """Somebody wants the job to end."""
        self.stopping = self.stopping or not self.exited
        self._ask(_Cause.STOP, number, grace_seconds)

    def stop_for_output(self) -> None:
        """The policy for output wants the job to end."""
        self._ask(_Cause.OUTPUT, signal.SIGTERM, None)

    def go_on(self) -> None:
        """Take what is asked for next as what an earlier service saw to, as far as it came."""
        self._reached = True

    def resume(self, asked: EarlierEndRequest) -> None:
        """Go on with what an earlier service asked for: its cause, its deadline, no new signal."""
        self._cause, self._reached = _Cause(asked.cause), True
        self.stopping = self._cause is _Cause.STOP
        now = trio.current_time()
        self._grace.deadline = now + max(0.0, asked.kill_in_seconds)
        self._sent_before, self._repeats_until = asked.signals, now + REPEATS_SECONDS

    async def time_out(self, seconds: float | None) -> None:
        """Ask for the end after so many seconds; None or 0 is never."""
        await trio.sleep(math.inf if not seconds else max(0.0, seconds))
        self._ask(_Cause.TIMEOUT, signal.SIGTERM, None)

    def _ask(self, cause: _Cause, number: signal.Signals, grace_seconds: float | None) -> None:
        if self.exited:
            return
        self._cause = self._cause or cause
        grace = self._grace_seconds if grace_seconds is None else grace_seconds
        self._grace.deadline = min(self._grace.deadline, trio.current_time() + grace)
        if number in self._sent_before and trio.current_time() < self._repeats_until:
            return
        # It may have been told often enough, or have ended.
        with suppress(trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
            self._signals.send_nowait(number)

    async def serve(self) -> None:
        """Deliver signals as they are asked for, and kill at the end of the grace period."""
        with self._grace:
            async for number in self._wanted:
                try:
                    delivered = await self._launcher.signal(self._job, number, self._as_ask())
                except JobworkerError as error:
                    if _has_ended(error):
                        return
                    log.warning("job %d: cannot send it %s: %s", self._job, number.name, error)
                    continue
                finally:
                    self._told()
                self._reached = True
                if not delivered:
                    break  # it would not even notice: waiting for it is in vain
        await self._kill()

    async def _kill(self) -> None:
        """Kill the job, however often that has to be tried."""
        while True:
            try:
                await self._launcher.kill(self._job, self._as_ask())
            except JobworkerError as error:
                if _has_ended(error):
                    return
                log.error("job %d: cannot kill it, trying again: %s", self._job, error)
                await trio.sleep(KILL_AGAIN_SECONDS)
            else:
                self._reached = True
                return
            finally:
                self._told()

    def _as_ask(self) -> EndRequest:
        assert self._cause is not None
        seconds = min(self._grace.deadline - trio.current_time(), _MAX_GRACE_SECONDS)
        return EndRequest(self._cause.value, max(0, math.ceil(seconds * 1000)))

    def verdict(self, ending: JobExit | None) -> tuple[Event, Reason | None]:
        """What is said of an end; None is a launcher that went under the job."""
        if ending is None:
            return Event.FAIL, Reason.LOST
        cause = self._cause if self._reached else None
        if cause is _Cause.STOP:
            return Event.STOP, None
        reason = self._reason(ending, cause)
        return (Event.SUCCEED, None) if reason is None else (Event.FAIL, reason)

    def _reason(self, ending: JobExit, cause: _Cause | None) -> Reason | None:
        for reason, applies in (
            (Reason.TIMEOUT, cause is _Cause.TIMEOUT),
            (Reason.OUTPUT, cause is _Cause.OUTPUT),
            (Reason.OOM, _is_of_memory(ending)),
            (Reason.SIGNAL, ending.signal is not None),
            (Reason.EXIT, bool(ending.code)),
            (Reason.DISK, bool(ending.lost)),
        ):
            if applies:
                return reason
        return None

    def close(self) -> None:
        """The job has ended: whoever asks now asks in vain.

        The execution, which is told, refers to this object. So this object lets go of it: Python
        collects cycles seldom, and until then all of an ended job would stay in memory.
        """
        self._signals.close()
        self._wanted.close()
        self._told = _tell_nobody


def _has_ended(error: JobworkerError) -> bool:
    """Whether a refusal says that there is nobody to be reached any more: the job or the launcher
    has ended, or this service ends.

    Any other says that the launcher lacked something for a moment.
    """
    gone = isinstance(error, (LauncherGone, LauncherSilent, NotFound))
    return gone or error.data.get("errno") == errno.ESRCH


def _is_of_memory(ending: JobExit) -> bool:
    """Whether the job ended for want of memory.

    At its own limit the job ends as a whole. Elsewhere a process of it may have been killed, and
    the program gone on to an end of its own.
    """
    killed = ending.signal == signal.SIGKILL
    return ending.want == "limit" or (ending.want != "" and killed)


def memory_words(ending: JobExit, reason: Reason | None) -> str:
    """What is to be said of kills for want of memory that were not for the job's own limit."""
    if ending.want == "kernel" and reason is Reason.OOM:
        return (
            f"it was {KILLED_FOR_MEMORY}: it held more of the kernel's own than a job may, "
            "in sockets or locks on files that its memory limit does not count"
        )
    if ending.want != "host":
        return ""
    count = ending.usage.oom_kills if ending.usage is not None else "some"
    some = f"{count} of its processes {'was' if count == 1 else 'were'}"
    who = "it was" if reason is Reason.OOM else some
    return f"{who} {KILLED_FOR_MEMORY}: the host, or a control group above the job's, had none left"
