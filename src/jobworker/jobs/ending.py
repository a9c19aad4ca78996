"""Ends a job: a cause, a signal, a grace period, and then SIGKILL.

A client's stop, the time-out and the policy for output end a job in the same way: the job gets a
signal and a grace period, and then SIGKILL for all processes that are left. If several of them end
a job, each signal is delivered, and the earliest deadline counts. A job that would not even notice
the signal is killed at once (`sandbox.launcher.signals.deliver`).

The job's record names the cause that came first. A later cause does not change it, and neither does
a request after the job has exited, while its output may still be on its way.

The cause and the deadline go to the launcher together with the signal
(`sandbox.protocol.end_requests`), without waiting for a disk. So the next service knows both
(`resume`): it sends no signal, and kills the job when this service would have done so. A client
whose connection broke may ask the next service for the same stop again. For `REPEATS_SECONDS` that
service does not send a signal again that the job has got already.
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
from jobworker.model.job import JobId
from jobworker.model.lifecycle import Event, Reason
from jobworker.sandbox.protocol.end_requests import OUTPUT, STOP, TIMEOUT, EndRequest
from jobworker.sandbox.service.job_reports import EarlierEndRequest, JobExit
from jobworker.sandbox.service.launcher_client import LauncherClient

log = logging.getLogger("jobworker.jobs")

MAX_PENDING_SIGNALS = 64
_MAX_GRACE_SECONDS = 1e12
"""The longest grace period that the launcher stores, as a number of milliseconds."""
KILL_AGAIN_SECONDS = 1.0
REPEATS_SECONDS = 120.0
"""How long after a restart a stop with a signal that the job has got counts as a repetition. A
client that lost its connection repeats its request as soon as it has connected again."""


def _tell_nobody() -> None:
    pass


class _Cause(Enum):
    """What ends a job: a client, the time-out, or the policy for output."""

    STOP = STOP
    TIMEOUT = TIMEOUT
    OUTPUT = OUTPUT


@define(eq=False, kw_only=True)
class Ending:
    """The requests to end one job, and the task that carries them out (`serve`)."""

    _job: JobId
    _launcher: LauncherClient
    _grace_seconds: float
    """The grace period of a request that names none."""
    _told: Callable[[], None] = _tell_nobody
    """Called when the launcher has got a request, or could not get it."""
    exited: bool = field(default=False, init=False)
    """Whether the service knows that the job has exited: later requests are too late."""
    stopping: bool = field(default=False, init=False)
    """Whether a client asked for the job's end while it ran."""
    _cause: _Cause | None = field(default=None, init=False)
    """The first cause; None while there is none."""
    _reached: bool = field(default=False, init=False)
    """Whether a signal reached the job. If not, the job has ended by itself."""
    _sent_before: frozenset[int] = field(default=frozenset(), init=False)
    """The signals that an earlier service has sent."""
    _repeats_until: float = field(default=-math.inf, init=False)
    _grace: trio.CancelScope = field(factory=trio.CancelScope, init=False)
    _signals: trio.MemorySendChannel[signal.Signals] = field(init=False)
    _wanted: trio.MemoryReceiveChannel[signal.Signals] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._signals, self._wanted = trio.open_memory_channel(MAX_PENDING_SIGNALS)

    @property
    def under_way(self) -> bool:
        """Whether there was any request to end the job while it ran."""
        return self._cause is not None

    def stop(self, number: signal.Signals, grace_seconds: float | None) -> None:
        """End the job at a client's request: send `number`, and kill after the grace period.

        None is the default grace period.
        """
        self.stopping = self.stopping or not self.exited
        self._request(_Cause.STOP, number, grace_seconds)

    def stop_for_output(self) -> None:
        """End the job by the policy for output: SIGTERM and the default grace period."""
        self._request(_Cause.OUTPUT, signal.SIGTERM, None)

    def go_on(self) -> None:
        """Take the next request for one that an earlier service has carried out before its end."""
        self._reached = True

    def resume(self, asked: EarlierEndRequest) -> None:
        """Go on with an earlier service's request: same cause, same deadline, no new signal."""
        self._cause, self._reached = _Cause(asked.cause), True
        self.stopping = self._cause is _Cause.STOP
        now = trio.current_time()
        self._grace.deadline = now + max(0.0, asked.kill_in_seconds)
        self._sent_before, self._repeats_until = asked.signals, now + REPEATS_SECONDS

    async def time_out(self, seconds: float | None) -> None:
        """Wait so many seconds, then end the job by its time-out. None and 0 wait for ever."""
        await trio.sleep(math.inf if not seconds else max(0.0, seconds))
        self._request(_Cause.TIMEOUT, signal.SIGTERM, None)

    def _request(self, cause: _Cause, number: signal.Signals, grace_seconds: float | None) -> None:
        if self.exited:
            return
        self._cause = self._cause or cause
        grace = self._grace_seconds if grace_seconds is None else grace_seconds
        self._grace.deadline = min(self._grace.deadline, trio.current_time() + grace)
        if number in self._sent_before and trio.current_time() < self._repeats_until:
            return
        # Ignored if `MAX_PENDING_SIGNALS` wait, or if the job has ended.
        with suppress(trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
            self._signals.send_nowait(number)

    async def serve(self) -> None:
        """Deliver the signals of requests, and kill the job at the end of the grace period.

        Returns when the job was killed or has ended, or when the launcher is gone.
        """
        with self._grace:
            async for number in self._wanted:
                try:
                    delivered = await self._launcher.signal(self._job, number, self._end_request())
                except JobworkerError as error:
                    if _has_ended(error):
                        return
                    log.warning("job %d: cannot send it %s: %s", self._job, number.name, error)
                    continue
                finally:
                    self._told()
                self._reached = True
                if not delivered:
                    break  # the job would not notice the signal: waiting would be in vain
        await self._kill()

    async def _kill(self) -> None:
        """Kill the job. Tries again until the launcher does it or the job has ended."""
        while True:
            try:
                await self._launcher.kill(self._job, self._end_request())
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

    def _end_request(self) -> EndRequest:
        """The cause and the time until the kill, as the launcher stores them."""
        assert self._cause is not None
        seconds = min(self._grace.deadline - trio.current_time(), _MAX_GRACE_SECONDS)
        return EndRequest(self._cause.value, max(0, math.ceil(seconds * 1000)))

    def verdict(self, ending: JobExit | None) -> tuple[Event, Reason | None]:
        """The event and the reason of an end. None: the launcher ended while the job ran."""
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
        """Ignore later requests: the job has ended."""
        self._signals.close()
        self._wanted.close()


def _has_ended(error: JobworkerError) -> bool:
    """Whether a refusal says that the job or the launcher has ended, or that this service ends.

    Any other refusal says that the launcher lacked something for a moment.
    """
    gone = isinstance(error, (LauncherGone, LauncherSilent, NotFound))
    return gone or error.data.get("errno") == errno.ESRCH


def _is_of_memory(ending: JobExit) -> bool:
    """Whether the job ended for want of memory.

    At its own limit a job is killed as a whole. If the host lacked memory, the kernel may have
    killed one process only, and the program may have gone on to its own end.
    """
    killed = ending.signal == signal.SIGKILL
    return ending.want == "limit" or (ending.want != "" and killed)
