"""The public client: typed calls over one connection, any number of them at a time.

Three tasks serve a connection. The dialled connection's own reads frames. The reader gives
each reply to the call that waits for it, by id, and each piece of output to its subscription. The
writer alone sends: a call that is cancelled while it waits has its request sent whole or not at
all, so cancelling a call abandons only the wait. What the server then answers is dropped, and a
subscription that nobody took is ended.

Output may overtake the task that asked for it. The reader therefore opens a subscription's inbox
itself, when it first hears of its number; numbers grow, so one below the highest that has no inbox
is one that was closed here.

Once the connection is lost, every waiting call and every later one raises the same error.
"""

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from datetime import datetime, timedelta
from os import PathLike
from pathlib import Path
from typing import Literal, TypeVar, overload

import trio
from attrs import define, field

from jobworker.client.address import Address, parse_address
from jobworker.client.dial import Connection, serve_connection
from jobworker.client.following import DELIVERY, Following, Inbox, anew
from jobworker.errors import ConnectionFailed, InvalidParams, JobworkerError, ProtocolError
from jobworker.model.job import JobId, JobRecord, JobSpec, Stream
from jobworker.model.lifecycle import State
from jobworker.pki.tls import client_context
from jobworker.protocol import messages as m
from jobworker.protocol.session import CallId, ClientSession, Output, Reply

CONNECT_SECONDS = 10.0

T = TypeVar("T")


@define(eq=False)
class _Pending:
    """A call that waits for its reply."""

    answered: trio.Event = field(factory=trio.Event)
    reply: Reply | JobworkerError | None = None

    def answer(self, reply: Reply | JobworkerError) -> None:
        if self.reply is None:  # a connection may be lost before the caller has seen its reply
            self.reply = reply
            self.answered.set()


@define(eq=False)
class Client:
    """A connection to a server; `open_client` makes one.

    Every method raises ConnectionFailed where the connection breaks, PermissionDenied where the
    certificate's role does not allow the call, and NotFound for a job that does not exist.
    """

    _connection: Connection
    _session: ClientSession = field(factory=ClientSession, init=False)
    _pending: dict[CallId, _Pending] = field(factory=dict, init=False)
    _inboxes: dict[int, Inbox] = field(factory=dict, init=False)
    _highest_subscription: int = field(default=0, init=False)
    _lost: JobworkerError | None = field(default=None, init=False)
    _outgoing: trio.MemorySendChannel[str] = field(init=False)
    _to_send: trio.MemoryReceiveChannel[str] = field(init=False)

    def __attrs_post_init__(self) -> None:
        # Unbounded: each call in it has a task that waits for its reply.
        self._outgoing, self._to_send = trio.open_memory_channel[str](float("inf"))

    # --- the calls --------------------------------------------------------------------------

    async def hello(self) -> m.Welcome:
        """Ask who the server is, and whom it takes this client for.

        welcome = await client.hello()
        print(welcome.name, welcome.role)
        """
        return await self._call("service.hello", m.Nothing(), m.Welcome)

    @overload
    async def run(self, job: JobSpec, *, follow: Literal[False] = False) -> JobRecord: ...

    @overload
    async def run(self, job: JobSpec, *, follow: Literal[True]) -> Following: ...

    async def run(self, job: JobSpec, *, follow: bool = False) -> JobRecord | Following:
        """Run a command: the job as admitted, or, with `follow`, its output from the first byte.

        Raises InvalidParams, TooLarge, Busy, and SandboxError where it cannot be started.

            spec = JobSpec(command=("make", "-j2"), limits=Limits(memory_bytes=64 << 20))
            job = await client.run(spec)
            print(job.id, job.state)

            with await client.run(spec, follow=True) as output:
                async for chunk in output:
                    print(chunk.stream, chunk.data)
        """
        job.check_size()
        delivery = DELIVERY if follow else None
        result = await self._call("job.run", m.RunParams(job=job, follow=delivery), m.RunResult)
        if not follow:
            return result.job
        return self._following(result.subscription, job=result.job)

    async def status(self, job: int) -> JobRecord:
        """Tell how a job is, with what it uses at this moment.

        print((await client.status(7)).state)
        """
        return await self._call("job.status", m.JobParams(id=JobId(job)), JobRecord)

    async def wait(self, job: int) -> JobRecord:
        """Wait for a job's end: its final record.

        print((await client.wait(7)).exit_code)
        """
        return await self._call("job.wait", m.JobParams(id=JobId(job)), JobRecord)

    async def stop(
        self, job: int, *, signal: str = "TERM", grace_seconds: float | None = None
    ) -> JobRecord:
        """Stop a job and wait for its end: a signal, a grace period, SIGKILL for all that is left.

        One that has ended already is left as it is. None stands for the server's grace period.

            await client.stop(7, signal="INT", grace_seconds=2)
        """
        params = m.StopParams(id=JobId(job), signal=signal, grace_seconds=grace_seconds)
        return await self._call("job.stop", params, JobRecord)

    async def list(
        self,
        *,
        states: Iterable[State] = (),
        labels: Mapping[str, str] | None = None,
        limit: int = 100,
        before: int | None = None,
    ) -> tuple[JobRecord, ...]:
        """List at most `limit` (at most 1000) jobs, newest first.

        Only those in `states`, where any are given, with all of `labels`, and with ids below
        `before`: the smallest id of the page before. Fewer may come where their commands are long;
        none is the end.

            for job in await client.list(states=[State.RUNNING]):
                print(job.id, job.spec.command)
        """
        params = m.ListParams(states=tuple(states), labels=labels or {}, limit=limit, before=before)
        return (await self._call("job.list", params, m.ListResult)).jobs

    async def log(
        self,
        job: int,
        *,
        follow: bool = True,
        offset: int = 0,
        tail_lines: int | None = None,
        since: datetime | timedelta | None = None,
        streams: Iterable[Stream] = (Stream.STDOUT, Stream.STDERR),
        coalesce: bool = True,
    ) -> Following:
        """Read a job's output from byte `offset` of both streams together.

        With `tail_lines` or `since` (a moment, or so long ago by the server's clock) it begins
        later: at the latest of all. With `follow` it goes on to the job's last byte, else it ends
        with what there is now. Without `coalesce` no chunk joins what was written at two times.

            with await client.log(7, streams=[Stream.STDERR], tail_lines=10) as output:
                async for chunk in output:
                    print(chunk.time, chunk.data)
        """
        ago = since.total_seconds() if isinstance(since, timedelta) else None
        params = m.LogParams(
            id=JobId(job),
            follow=follow,
            offset=offset,
            tail_lines=tail_lines,
            since=since if isinstance(since, datetime) else None,
            since_seconds=ago,
            streams=tuple(streams),
            coalesce=coalesce,
            delivery=DELIVERY,
        )
        result = await self._call("job.log", params, m.LogResult)
        return self._following(result.subscription, offset=result.offset)

    # --- calls and subscriptions ------------------------------------------------------------

    async def _call(self, name: str, params: object, result: type[T]) -> T:
        if self._lost is not None:
            raise anew(self._lost)
        id_, message = self._session.call(name, params)
        pending = self._pending[id_] = _Pending()
        self._outgoing.send_nowait(message)
        try:
            await pending.answered.wait()
        except trio.Cancelled:
            if isinstance(pending.reply, Reply):  # answered and cancelled at once
                self._abandon(pending.reply)
            raise
        finally:
            self._pending.pop(id_, None)
        reply = pending.reply
        if isinstance(reply, JobworkerError):
            raise anew(reply)
        assert reply is not None
        if reply.error is not None:
            raise reply.error
        assert isinstance(reply.result, result)
        return reply.result

    def _following(
        self, subscription: int | None, *, job: JobRecord | None = None, offset: int = 0
    ) -> Following:
        inbox = None if subscription is None else self._inboxes.get(subscription)
        if subscription is None or inbox is None:
            raise ProtocolError("cannot follow the job: the server opened no subscription")
        return Following(
            job=job,
            offset=offset,
            inbox=inbox,
            grant=lambda count: self._grant(subscription, count),
            forget=lambda ended: self._forget(subscription, ended=ended),
        )

    def _grant(self, subscription: int, count: int) -> None:
        self._notify("job.credit", m.CreditParams(subscription=subscription, bytes=count))

    def _forget(self, subscription: int, *, ended: bool = False) -> None:
        self._inboxes.pop(subscription, None)
        if not ended:
            self._notify("job.unfollow", m.SubscriptionParams(subscription=subscription))

    def _notify(self, name: str, params: object) -> None:
        if self._lost is None:
            self._outgoing.send_nowait(self._session.notify(name, params))

    # --- the connection's tasks -------------------------------------------------------------

    async def _serve_writer(self) -> None:
        """Send what calls have put out, until the connection is lost."""
        try:
            async for message in self._to_send:
                await self._connection.send(message)
        except ConnectionFailed as lost:
            self._lose(lost)

    async def _serve_reader(self) -> None:
        """Give what comes to those who wait for it, until the connection is lost."""
        try:
            while True:
                self._take(self._session.receive(await self._connection.receive()))
        except JobworkerError as lost:
            self._lose(lost)

    def _take(self, received: Reply | Output | m.OutputEnd | None) -> None:
        match received:
            case Reply():
                pending = self._pending.get(received.id)
                subscription = getattr(received.result, "subscription", None)
                if subscription is not None:
                    self._inbox(subscription)
                if pending is None:
                    self._abandon(received)
                else:
                    pending.answer(received)
            case Output():
                self._deliver(received.header.subscription, received)
            case m.OutputEnd():
                self._deliver(received.subscription, received)

    def _deliver(self, subscription: int, item: Output | m.OutputEnd) -> None:
        inbox = self._inbox(subscription)
        if inbox is not None:
            inbox.put(item)

    def _inbox(self, subscription: int) -> Inbox | None:
        if subscription > self._highest_subscription:
            self._highest_subscription = subscription
            self._inboxes[subscription] = Inbox.make()
        return self._inboxes.get(subscription)

    def _abandon(self, reply: Reply) -> None:
        """End a subscription whose caller has gone."""
        subscription = getattr(reply.result, "subscription", None)
        if subscription is not None:
            self._forget(subscription)

    def _lose(self, error: JobworkerError) -> None:
        if self._lost is None:
            self._lost = error
            for pending in self._pending.values():
                pending.answer(error)
            for inbox in self._inboxes.values():
                inbox.put(error)


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


def _parsed(address: str) -> Address:
    try:
        return parse_address(address)
    except ValueError as fault:
        raise InvalidParams(f"cannot connect: {fault}") from None


@asynccontextmanager
async def open_client(
    address: str | Address,
    *,
    ca: str | PathLike[str],
    certificate: str | PathLike[str],
    key: str | PathLike[str],
) -> AsyncIterator[Client]:
    """Connect to a server and be its client; the connection ends with the block, jobs go on.

    `address` is HOST, HOST:PORT or [IPv6]:PORT; the server's certificate must be from the CA in
    the PEM file `ca` and bear that host. `certificate` and `key` are the client's own PEM files.

    Raises InvalidParams for the address, CredentialsUnusable, HostUnknown, ConnectionFailed
    (after 10 s at the latest), ServerUntrusted, CertificateRefused and PermissionDenied.

        async with open_client("localhost", ca=ca, certificate=cert, key=key) as client:
            job = await client.run(JobSpec(command=("echo", "hello")))
    """
    where = _parsed(address) if isinstance(address, str) else address
    tls = client_context(ca=Path(ca), certificate=Path(certificate), key=Path(key))
    raised: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            # What ends the block is carried around the nursery, which would wrap it in a group.
            try:
                with _connecting(where):
                    connection = await nursery.start(serve_connection, where, tls)
                client = Client(connection)
                nursery.start_soon(client._serve_writer)
                nursery.start_soon(client._serve_reader)
                try:
                    yield client
                except Exception:
                    await connection.aclose()
                    raise
                await connection.aclose()
            except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001
                raised = error
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup:
        if raised is None:
            raise
    if raised is not None:
        raise raised
