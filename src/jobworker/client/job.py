"""A job as its client sees it: a number, what can be asked about it, and its output.

Neither holds the job itself: dropping them, leaving a loop or being cancelled never stops it.
"""

from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from types import TracebackType
from typing import Self

from attrs import define, evolve, field

from jobworker.client.calls import Calls
from jobworker.client.checked import check_callback, checked
from jobworker.client.following import DELIVERY, Chunk, Following
from jobworker.errors import (
    CertificateRefused,
    ConnectionFailed,
    FollowerStalled,
    InvalidParams,
    JobworkerError,
    ShuttingDown,
)
from jobworker.exact import kind
from jobworker.model.job import MAX_TIMEOUT_SECONDS, JobId, JobRecord, JobStatus, Stream
from jobworker.protocol import messages as m


@define(eq=False)
class Job:
    """One job of a server; `Client.run` and `Client.job` make it.

    Every method raises NotFound for a job that does not exist (or is another tenant's),
    PermissionDenied where the certificate's role does not allow it, and ConnectionFailed where
    the connection is lost and the client's patience ends.
    """

    _calls: Calls = field(repr=False)
    id: JobId
    record: JobRecord | None = None
    """The job as it was when the server last told of it; None where it was never asked.

    A summary (`JobRecord.abridged`) unless `status` has asked for all of it.
    """
    _first: Following | None = field(default=None, repr=False)
    """The subscription that came with the job, until someone takes it."""

    async def status(self) -> JobStatus:
        """Ask for all of the job's record, with what it uses at this moment.

        >>> (await job.status()).state
        <State.RUNNING: 'RUNNING'>
        """
        params = checked("ask for the job", m.JobParams, id=self.id)
        self.record = told = await self._calls.call("job.status", params, JobStatus)
        return told

    async def wait(self) -> JobRecord:
        """Wait for the job's end: a summary of its final record.

        >>> job = await client.run(["sh", "-c", "exit 3"])
        >>> record = await job.wait()
        >>> record.state, record.reason, record.exit_code
        (<State.FAILED: 'FAILED'>, <Reason.EXIT: 'exit'>, 3)
        """
        return await self._told("job.wait", checked("wait for the job", m.JobParams, id=self.id))

    async def stop(
        self,
        *,
        signal: str = "TERM",
        grace_seconds: float | None = None,
        on_asked: Callable[[bool], None] | None = None,
    ) -> JobRecord:
        """Stop the job and wait for its end: a signal, a grace period, SIGKILL for what is left.

        One that has ended already is left as it is. None stands for the server's grace period.
        Where the wait is cancelled, the server goes on with the stop if it has been asked:
        `on_asked` hears whether it may have been, when that changes.

        >>> (await job.stop(signal="INT", grace_seconds=2)).state
        <State.STOPPED: 'STOPPED'>
        """
        check_callback("stop the job", "on_asked", on_asked)
        params = checked(
            "stop the job", m.StopParams, id=self.id, signal=signal, grace_seconds=grace_seconds
        )
        return await self._told("job.stop", params, on_asked)

    async def remove(self, *, force: bool = False) -> m.Removed:
        """Remove an ended job: its output, and all that is known of it.

        With `force` one that is alive is killed first. Raises Busy where it is alive, or where its
        output is being followed. Where the answer was lost with a connection, and the job is gone
        when asked again, 0 bytes are told.

        >>> job = await client.run(["echo", "gone"])
        >>> record = await job.wait()
        >>> (await job.remove()).jobs == (job.id,)
        True
        """
        params = checked("remove the job", m.RemoveParams, id=self.id, force=force)
        gone = m.Removed(jobs=(self.id,), bytes=0)
        return await self._calls.call("job.remove", params, m.Removed, gone=gone)

    def output(
        self,
        *,
        follow: bool = True,
        offset: int = 0,
        tail_lines: int | None = None,
        since: datetime | timedelta | None = None,
        streams: Iterable[Stream | str] = (Stream.STDOUT, Stream.STDERR),
        coalesce: bool = True,
        on_break: Callable[[JobworkerError, int], None] | None = None,
    ) -> "JobOutput":
        """The job's output, from byte `offset` of both streams together.

        With `tail_lines` or `since` (a moment, or so long ago by the server's clock) each stream
        begins later, with a whole line: at the latest of all. A moment without a zone is local
        time. With `follow` it goes on to the job's last byte, else it ends with what there is now.
        Without `coalesce` no chunk joins what was written at two times. What is written to both
        streams one shortly after the other may come in the other order. `on_break` hears of each
        lost connection, and of the offset at which it goes on.

        >>> job = await client.run(["sh", "-c", "echo hello; echo oops >&2"])
        >>> async for chunk in job.output(streams=[Stream.STDOUT]):
        ...     print(chunk.data)
        b'hello\\n'
        """
        check_callback("follow the job", "on_break", on_break)
        ago = since.total_seconds() if isinstance(since, timedelta) else None
        if not isinstance(since, datetime | timedelta | None):
            told = f"must be a datetime or a timedelta, not {kind(since)}"
            raise InvalidParams(f"cannot follow the job: since: {told}")
        if not 0 <= (ago or 0) <= MAX_TIMEOUT_SECONDS:
            raise InvalidParams("cannot follow the job: since: must be from 0 to 3650 days ago")
        params = checked(
            "follow the job",
            m.LogParams,
            id=self.id,
            follow=follow,
            offset=offset,
            tail_lines=tail_lines,
            since=None if isinstance(since, timedelta) else since,
            since_seconds=ago,
            streams=streams,
            coalesce=coalesce,
            delivery=DELIVERY,
        )
        first = None
        if params == m.LogParams(id=self.id, delivery=DELIVERY):
            first, self._first = self._first, None
        return JobOutput(self._calls, params, on_break, first)

    async def _told(
        self, method: str, params: object, on_asked: Callable[[bool], None] | None = None
    ) -> JobRecord:
        self.record = await self._calls.call(method, params, JobRecord, on_asked=on_asked)
        return self.record


@define(eq=False)
class JobOutput:
    """The output of a job, chunk by chunk; iterate over it once, in one task.

    A connection that breaks is made anew and the output goes on at the next byte, without gap or
    repeat, as long as the client's patience lasts. After the last chunk `record` tells how the job
    went. Leaving the `with` block, or `close`, ends the subscription at once; whoever leaves the
    loop without one leaves that to Python's collection of garbage.

    Iterating raises what the server met where it could not send the output to its end.

    >>> job = await client.run(["seq", "3"])
    >>> with job.output() as output:
    ...     data = b"".join([chunk.data async for chunk in output])
    >>> data, output.offset, output.record.state
    (b'1\\n2\\n3\\n', 6, <State.COMPLETED: 'COMPLETED'>)
    """

    _calls: Calls
    _params: m.LogParams
    _on_break: Callable[[JobworkerError, int], None] | None
    _following: Following | None
    record: JobRecord | None = field(default=None, init=False)
    """The job at the end of its output; None before."""

    offset: int = field(init=False)
    """Position after the last chunk, in both streams together: where to go on."""

    def __attrs_post_init__(self) -> None:
        self.offset = self._params.offset

    def close(self) -> None:
        """End the subscription; a second call does nothing."""
        if self._following is not None:
            self._following.close()
            self._params = self._rest(self._following)
            self._following = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        raised: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        while self.record is None:
            if self._following is None:
                self._following = await self._calls.open_following(self._params)
                self.offset = self._following.offset
            try:
                chunk = await anext(self._following)
            except StopAsyncIteration:
                self.offset = self._following.offset
                self.record = self._following.record
                self.close()
            except (FollowerStalled, ShuttingDown):
                # The consumer had paused, or the next service has the rest: go on.
                self.close()
            except (ConnectionFailed, CertificateRefused) as lost:
                self.close()
                if self._on_break is not None:
                    self._on_break(lost, self.offset)
            else:
                self.offset = self._following.offset
                return chunk
        raise StopAsyncIteration

    def receive_nowait(self) -> Chunk | None:
        """The next chunk if it has come already, for who would rather have many at once.

        None where nothing has come, or where it is no chunk: iterate on to wait, or to learn what.

        >>> job = await client.run(["seq", "3"])
        >>> data = b""
        >>> with job.output() as output:
        ...     async for chunk in output:
        ...         data += chunk.data
        ...         while (more := output.receive_nowait()) is not None:
        ...             data += more.data
        >>> data
        b'1\\n2\\n3\\n'
        """
        chunk = None if self._following is None else self._following.receive_nowait()
        if chunk is not None:
            self.offset = chunk.offset + len(chunk.data)
        return chunk

    def _rest(self, begun: Following) -> m.LogParams:
        """What to ask for next: what follows, whatever it began with."""
        return evolve(
            self._params,
            offset=begun.offset,
            tail_lines=None,
            since=None,
            since_seconds=None,
            starts=begun.starts,
        )
