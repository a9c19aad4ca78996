"""Passes the launcher's events to the executions of the jobs, by memory channels.

Each job that was started or taken over has two memory channels. One gets the job's only `JobExit`,
the other gets notices while the job runs. Both close when the job or the launcher has ended.
"""

import time
from contextlib import suppress

import trio
from attrs import Factory, define, frozen

from jobworker.model.job import JobId
from jobworker.sandbox.protocol.events import Event, JobEnded
from jobworker.sandbox.service.job_reports import EarlierEndRequest, JobExit, KeptJob, exit_from

Exits = trio.MemoryReceiveChannel[JobExit]
"""Gets a job's only `JobExit`, or closes without one if the launcher ends."""
Notices = trio.MemoryReceiveChannel[str]
"""Gets sentences about a running job for its log; closes when the job has ended."""
NOTICES_KEPT = 8


def _no_notices() -> Notices:
    send, receive = trio.open_memory_channel[str](0)
    send.close()
    return receive


@frozen(kw_only=True)
class Started:
    """A running job: its first process, and the read ends of its pipes, which the caller owns."""

    pid: int
    stdout: int
    stderr: int
    since: float = Factory(time.monotonic)
    notices: Notices = Factory(_no_notices)
    asked: EarlierEndRequest | None = None
    """The end that an earlier service has asked for; None if it has not."""

    @property
    def age_seconds(self) -> float:
        """How long the job has run."""
        return time.monotonic() - self.since


@define(eq=False)
class JobEnds:
    """The channels of all jobs that have not ended."""

    _exits: dict[JobId, trio.MemorySendChannel[JobExit]] = Factory(dict)
    _notices: dict[JobId, trio.MemorySendChannel[str]] = Factory(dict)

    def expect(self, job: JobId) -> tuple[Exits, Notices]:
        """Open the channels of a job that is about to be started."""
        self._exits[job], exits = trio.open_memory_channel[JobExit](1)
        self._notices[job], notices = trio.open_memory_channel[str](NOTICES_KEPT)
        return exits, notices

    def expect_no_more(self, job: JobId) -> None:
        """Close the channels of a job that has ended, or whose start has failed."""
        for channels in (self._exits, self._notices):
            if (unwanted := channels.pop(job, None)) is not None:
                unwanted.close()

    def inherit(self, listed: KeptJob) -> tuple[Started, Exits]:
        """Open the channels of a job that the launcher has kept.

        If the job has ended already, its `JobExit` is in the channel and both are closed.
        """
        job = JobId(listed.job)
        exits, notices = self.expect(job)
        if listed.network_end:
            self._on_network_end(job, listed.network_end)
        if listed.exit is not None:
            self._on_end(job, listed.exit)
        started = Started(
            pid=listed.pid,
            stdout=listed.stdout,
            stderr=listed.stderr,
            since=listed.since,
            notices=notices,
            asked=listed.asked,
        )
        return started, exits

    def on_event(self, event: Event) -> None:
        """Pass an event to the channel of its job. An event of an unknown job is dropped."""
        if isinstance(event, JobEnded):
            self._on_end(JobId(event.job), exit_from(event))
        else:
            self._on_network_end(JobId(event.job), event.why)

    def close(self) -> None:
        """Close the channels of all jobs."""
        for job in list(self._exits):
            self.expect_no_more(job)

    def _on_end(self, job: JobId, ending: JobExit) -> None:
        if (exits := self._exits.get(job)) is not None:
            with suppress(trio.BrokenResourceError):  # the receiver has closed its end
                exits.send_nowait(ending)
        self.expect_no_more(job)

    def _on_network_end(self, job: JobId, why: str) -> None:
        notices = self._notices.get(job)
        if notices is not None:
            # The channel is full, or the receiver has closed its end: the notice is dropped.
            with suppress(trio.WouldBlock, trio.BrokenResourceError):
                notices.send_nowait(f"its private network ended: {why}")
