"""A job on the client's side: its id, the calls about it, and its output.

These objects do not own the job. It goes on if they are deleted, if a loop over its output is left,
or if a call is cancelled.
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
from jobworker.model.job import MAX_TIMEOUT_SECONDS, JobId, JobRecord, JobStatus, Stream
from jobworker.protocol import messages as m
from jobworker.serialization.exact import kind


@define(eq=False)
class Job:
    """One job of a server; `Client.run` and `Client.job` make it.

    Every method raises NotFound for a job that does not exist (or is another tenant's),
    PermissionDenied if the certificate's role does not allow the call, and ConnectionFailed if the
    connection is lost and the client's patience is over.
    """

    _calls: Calls = field(repr=False)
    id: JobId
    record: JobRecord | None = None
    """The latest record that the server has sent; None before the first.

    It is a summary (`JobRecord.abridged`), or the whole record after `status`.
    """
    _first: Following | None = field(default=None, repr=False)
    """The subscription that `Client.run` has opened, until `output` uses it."""

    async def status(self) -> JobStatus:
        """Return the whole record of the job, with its current usage.

        >>> (await job.status()).state
        <State.RUNNING: 'RUNNING'>
        """
        params = checked("ask for the job", m.JobParams, id=self.id)
        self.record = record = await self._calls.call("job.status", params, JobStatus)
        return record

    async def wait(self) -> JobRecord:
        """Wait for the job's end, and return a summary of its final record.

        >>> job = await client.run(["sh", "-c", "exit 3"])
        >>> record = await job.wait()
        >>> record.state, record.reason, record.exit_code
        (<State.FAILED: 'FAILED'>, <Reason.EXIT: 'exit'>, 3)
        """
        return await self._call("job.wait", checked("wait for the job", m.JobParams, id=self.id))

    async def stop(
        self,
        *,
        signal: str = "TERM",
        grace_seconds: float | None = None,
        on_asked: Callable[[bool], None] | None = None,
    ) -> JobRecord:
        """Stop the job and wait for its end: a signal, a grace period, SIGKILL for all processes.

        A job that has ended stays unchanged. `grace_seconds=None` is the server's grace period.
        Returns a summary of the final record. If the wait is cancelled after the server has got the
        request, the server goes on with the stop. `on_asked` is called with whether the server may
        have the request, whenever that changes.

        >>> (await job.stop(signal="INT", grace_seconds=2)).state
        <State.STOPPED: 'STOPPED'>
        """
        check_callback("stop the job", "on_asked", on_asked)
        params = checked(
            "stop the job", m.StopParams, id=self.id, signal=signal, grace_seconds=grace_seconds
        )
        return await self._call("job.stop", params, on_asked)

    async def remove(self, *, force: bool = False) -> m.Removed:
        """Remove an ended job: its output and its record.

        `force` kills a live job first. Without it, raises Busy if the job is alive or a client
        follows its output. If the reply is lost with the connection and the retry does not find the
        job, it is removed, and the result has 0 bytes.

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
        """Return the job's output, from byte `offset` of both streams together.

        `tail_lines` and `since` let each stream begin later, with a whole line; the latest of the
        given starts counts. `since` is a time (local without a zone), or a duration before now by
        the server's clock. With `follow`, the output goes on to the job's last byte; without it,
        it ends after the bytes that exist now.

        Without `coalesce`, no chunk contains bytes that were written at different times. If a job
        writes to both streams within a short time, their order may change. `on_break` is called
        with the error of each lost connection and the offset at which the output resumes.

        >>> job = await client.run(["sh", "-c", "echo hello; echo oops >&2"])
        >>> async for chunk in job.output(streams=[Stream.STDOUT]):
        ...     print(chunk.data)
        b'hello\\n'
        """
        check_callback("follow the job", "on_break", on_break)
        ago = since.total_seconds() if isinstance(since, timedelta) else None
        if not isinstance(since, datetime | timedelta | None):
            problem = f"must be a datetime or a timedelta, not {kind(since)}"
            raise InvalidParams(f"cannot follow the job: since: {problem}")
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

    async def _call(
        self, method: str, params: object, on_asked: Callable[[bool], None] | None = None
    ) -> JobRecord:
        self.record = await self._calls.call(method, params, JobRecord, on_asked=on_asked)
        return self.record


@define(eq=False)
class JobOutput:
    """The output of a job, chunk by chunk; iterate over it once, in one task.

    If the connection breaks, the client reconnects and the output resumes at the next byte, without
    gap or repeat, as long as the client's patience lasts. After the last chunk, `record` is the
    job's final record. The end of the `with` block, or `close`, ends the subscription at once. If a
    loop is left without either, the garbage collector ends it later.

    The iteration raises the server's error if the server could not send the output to its end, and
    again if it is asked again; `record` then stays None.

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
    """Position after the last chunk, in both streams together: the offset to resume at."""

    def __attrs_post_init__(self) -> None:
        self.offset = self._params.offset

    def close(self) -> None:
        """End the subscription. Idempotent."""
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
                # The consumer was too slow, or the service ends and the next one has the rest.
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
        """Return the next chunk if it has arrived, to process many chunks at once.

        Returns None if nothing has arrived, or an end or an error: iterate to wait, or to get it.

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
        """The parameters of a new subscription to the output after that of `begun`."""
        return evolve(
            self._params,
            offset=begun.offset,
            tail_lines=None,
            since=None,
            since_seconds=None,
            starts=begun.starts,
        )
