"""The public client: typed calls to one server, over as many connections as it takes.

One task keeps a connection (`serve`): it dials, serves the connection to its end, and dials anew
when someone next needs one, with growing pauses, until patience ends. The first connection
must succeed: what is wrong with an address or a certificate is told at once.

What a call does when its connection breaks depends on what it asks for. Asking, waiting and
stopping may be done twice, and are. Running a command may not: whoever called learns that the
connection broke and that the job may have been started.
"""

import random
from collections.abc import (
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import contextmanager
from typing import TypeVar

import trio
from attrs import define, field

from jobworker.client.address import Address
from jobworker.client.following import DELIVERY, Following, anew
from jobworker.client.job import Job
from jobworker.client.link import Link
from jobworker.errors import Busy, ConnectionFailed, InvalidParams, JobworkerError
from jobworker.model.job import JobId, JobRecord, JobSpec
from jobworker.model.lifecycle import State
from jobworker.model.volumes import Volume
from jobworker.protocol import messages as m

CONNECT_SECONDS = 10.0
PATIENCE_SECONDS = 120.0
FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 5.0

T = TypeVar("T")

Dial = Callable[..., Awaitable[None]]
"""Serves one connection to its end, and reports it as started: `dial.serve_connection`."""


@define(eq=False, kw_only=True)
class Client:
    """A client of one server; `open_client` makes one.

    Every method raises ConnectionFailed where the connection is lost and patience ends,
    CertificateRefused where the server ends it because our certificate was revoked or has expired,
    PermissionDenied where the certificate's role does not allow the call, and NotFound for a job
    that does not exist. Cancelling a call abandons its wait and stops no job.
    """

    _address: Address
    _dial: Dial = field(repr=False)
    _patience_seconds: float = PATIENCE_SECONDS
    _on_lost: Callable[[JobworkerError], None] | None = field(default=None, repr=False)
    _link: Link | None = field(default=None, init=False, repr=False)
    _over: JobworkerError | None = field(default=None, init=False)
    """Why there will be no connection any more."""
    _wanted: trio.Event = field(factory=trio.Event, init=False, repr=False)
    _changed: trio.Event = field(factory=trio.Event, init=False, repr=False)

    async def hello(self) -> m.Welcome:
        """Ask who the server is, and whom it takes this client for.

        >>> welcome = await client.hello()
        >>> welcome.name, welcome.role
        ('admin-client', 'admin')
        """
        return await self.call("service.hello", m.Nothing(), m.Welcome)

    async def run(self, spec: JobSpec | Sequence[str], *, follow: bool = False) -> Job:
        """Run a command, alone or with all that a JobSpec says of it: the job as admitted.

        With `follow` the output comes along, which saves `Job.output` a round trip; a window of it
        is kept until someone takes it.

        Raises InvalidParams, TooLarge, Busy, SandboxError where the job cannot be started, and
        ConnectionFailed where it may have been.

        >>> job = await client.run(["echo", "hello"])
        >>> async for chunk in job.output():
        ...     print(chunk.stream.value, chunk.data)
        stdout b'hello\\n'
        >>> (await job.wait()).state
        <State.COMPLETED: 'COMPLETED'>

        >>> limits = Limits(cpu_percent=50, memory_bytes=64 << 20)
        >>> job = await client.run(JobSpec(command=("nproc",), limits=limits, timeout_seconds=60))
        >>> job.record.owner
        'admin-client'

        >>> await client.run(["no-such-program"])
        Traceback (most recent call last):
        jobworker.errors.CommandNotFound: cannot run no-such-program: ...
        """
        made = spec if isinstance(spec, JobSpec) else _spec(spec)
        made.check_size()
        params = m.RunParams(job=made, follow=DELIVERY if follow else None)
        try:
            link, result = await self._call("job.run", params, m.RunResult, again=False)
        except ConnectionFailed as lost:
            remedy = "the job may have been started: see the list before running it again"
            raise ConnectionFailed(lost.message, remedy=remedy, data=lost.data) from None
        first = link.following(result.subscription, 0) if follow else None
        return Job(self, result.job.id, result.job, first)

    async def plan(self, spec: JobSpec | Sequence[str]) -> m.Plan:
        """How a command would be run: its limits, and the steps of its start; nothing is run.

        Raises what would refuse it before its first step.

        >>> plan = await client.plan(["true"])
        >>> plan.steps[0].name, plan.steps[-1].subject
        ('attach-scope', '')
        """
        made = spec if isinstance(spec, JobSpec) else _spec(spec)
        made.check_size()
        return await self.call("job.plan", m.PlanParams(job=made), m.Plan)

    def job(self, number: int) -> Job:
        """The job of that number; the server is not asked yet.

        >>> job = client.job((await client.run(["true"])).id)
        >>> (await job.wait()).exit_code
        0

        >>> await client.job(999_999_999).status()
        Traceback (most recent call last):
        jobworker.errors.NotFound: cannot find job 999999999: ...
        """
        return Job(self, JobId(number))

    async def list(
        self,
        *,
        states: Iterable[State] = (),
        labels: Mapping[str, str] | None = None,
        name: str = "",
        limit: int = 100,
        before: int | None = None,
    ) -> tuple[JobRecord, ...]:
        """List at most `limit` (at most 1000) jobs, newest first, by summaries.

        Only those in `states`, where any are given, with all of `labels`, called `name` if that is
        given, and with ids below `before`: the smallest id of the page before. Fewer may come where
        the search is long; none is the end. A summary has no variables, and its command may be cut
        (`record.abridged`); `Job.status` tells all.

        >>> job = await client.run(["sleep", "60"])
        >>> [record.spec.command for record in await client.list(states=[State.RUNNING], limit=1)]
        [('sleep', '60')]
        """
        wanted = {"states": tuple(states), "labels": labels or {}, "name": name, "limit": limit}
        while True:
            params = m.ListParams(**wanted, before=before)  # type: ignore[arg-type]
            page = await self.call("job.list", params, m.ListResult)
            if page.jobs or page.next is None:
                return page.jobs
            before = page.next

    async def prune(self, params: m.PruneParams) -> m.Removed:
        """Remove ended jobs' output, the oldest first; their records stay.

        >>> (await client.prune(PruneParams(older_than_seconds=86400))).jobs
        ()
        """
        return await self.call("job.prune", params, m.Removed)

    async def make_volume(self, name: str, size_bytes: int) -> None:
        """Make a volume: a disk of that size which outlives jobs, at least 16 MiB.

        Raises InvalidParams where it exists, or the server's disk has no room for it.

        >>> await client.make_volume("cache", 64 << 20)
        >>> await client.remove_volume("cache")
        """
        spec = m.VolumeSpec(name=name, size_bytes=size_bytes)
        await self.call("volume.create", spec, m.Nothing)

    async def volumes(self) -> tuple[Volume, ...]:
        """List all volumes, by name.

        >>> await client.make_volume("kept", 16 << 20)
        >>> [volume.name for volume in await client.volumes()]
        ['kept']
        >>> await client.remove_volume("kept")
        """
        return (await self.call("volume.list", m.Nothing(), m.Volumes)).volumes

    async def remove_volume(self, name: str) -> None:
        """Remove a volume with all that is on it. Raises NotFound, and Busy while a job has it.

        >>> await client.make_volume("old", 16 << 20)
        >>> await client.remove_volume("old")
        """
        await self.call("volume.remove", m.VolumeParams(name=name), m.Nothing)

    async def call(self, name: str, params: object, result: type[T]) -> T:
        """Call a method of the protocol by name, as often as it takes to get an answer."""
        return (await self._call(name, params, result))[1]

    async def open_following(self, params: m.LogParams) -> Following:
        """Open a subscription; it lasts no longer than the connection that it is opened on."""
        link, result = await self._call("job.log", params, m.LogResult)
        return link.following(result.subscription, result.offset, result.starts)

    async def _call(
        self, name: str, params: object, result: type[T], *, again: bool = True
    ) -> tuple[Link, T]:
        while True:
            link = await self._linked()
            try:
                return link, await link.call(name, params, result)
            except ConnectionFailed:
                if not again:
                    raise

    async def _linked(self) -> Link:
        """Wait for a connection. Raises why there is none any more."""
        while True:
            if self._over is not None:
                raise anew(self._over)
            if self._link is not None and self._link.failure is None:
                return self._link
            self._wanted.set()
            await self._changed.wait()

    # --- the task that keeps a connection ---------------------------------------------------

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep a connection; started once the first stands. Raises why that one cannot be made."""
        lost = await self._serve_link(task_status.started)
        while self._patience_seconds > 0:
            await self._wanted.wait()
            if self._on_lost is not None:
                self._on_lost(lost)
            try:
                lost = await self._serve_next_link()
            except JobworkerError as refused:
                lost = refused
                break
        self._over = lost
        self._tell_change()

    async def _serve_next_link(self) -> JobworkerError:
        """Dial until a connection stands, serve it: why it was lost. Raises when patience ends."""
        patience_ends = trio.current_time() + self._patience_seconds
        pause = FIRST_PAUSE_SECONDS
        while True:
            # Not all clients at once, where a restart broke many.
            await trio.sleep(pause * random.uniform(0.5, 1))  # noqa: S311
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            try:
                return await self._serve_link(lambda: None)
            except (ConnectionFailed, Busy):
                if trio.current_time() >= patience_ends:
                    raise

    async def _serve_link(self, tell_started: Callable[[], None]) -> JobworkerError:
        """Dial, and serve the connection to its end: why it was lost. Raises why there is none."""
        refusal: JobworkerError | None = None
        failure: JobworkerError | None = None
        async with trio.open_nursery() as nursery:
            try:
                with _connecting(self._address):
                    connection = await nursery.start(self._dial)
            except JobworkerError as error:  # carried around the nursery, which would wrap it
                refusal = error
            else:
                self._link = link = Link(connection)
                nursery.start_soon(link.serve_writer)
                nursery.start_soon(link.serve_reader)
                self._wanted = trio.Event()
                self._tell_change()
                tell_started()
                await link.lost.wait()
                failure = link.failure
            nursery.cancel_scope.cancel()
        if refusal is not None:
            raise refusal
        assert failure is not None
        return failure

    def _tell_change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def aclose(self) -> None:
        """Say goodbye, for at most a second."""
        if self._link is not None:
            await self._link.connection.aclose()


def _spec(command: Sequence[str]) -> JobSpec:
    if isinstance(command, str):
        raise InvalidParams(
            f"cannot run {command!r}: the command is one string",
            remedy='give program and arguments apart: ["ls", "-l"], or ["sh", "-c", "ls | wc"]',
        )
    try:
        return JobSpec(command=tuple(command))
    except (TypeError, ValueError) as fault:
        raise InvalidParams(f"cannot run the command: it {fault}") from None


@contextmanager
def _connecting(address: Address) -> Iterator[None]:
    try:
        with trio.fail_after(CONNECT_SECONDS):
            yield
    except trio.TooSlowError:
        raise ConnectionFailed(
            f"cannot connect to {address}: no answer within {CONNECT_SECONDS:.0f} s",
            remedy="is a firewall in between? check --server or WORKER_SERVER",
        ) from None
