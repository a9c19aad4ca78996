"""Calls to one server, which are retried over new connections when one breaks.

One task keeps a connection (`serve`). It dials, serves the connection to its end, and dials again
when a call needs a connection, with growing pauses (exponential backoff), until the patience is
over. The waiting calls then raise the error; a later call starts the attempts again. The first
connection must succeed, so a wrong address or certificate is reported at once.

Whether a call is retried after its connection breaks depends on the reason (`protocol.closing`) and
on the method. Queries, waits, stops and removals are idempotent, and are retried. `job.run` and
`volume.create` are not idempotent. Such a call is retried only if no server can have the whole
request, or if a service that is ending has refused it (`shutting_down`). Otherwise the caller gets
an error which says that the job may have been started.
"""

import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import trio
from attrs import define, field

from jobworker.client.address import Address
from jobworker.client.following import Following, copied
from jobworker.client.rpc_connection import RpcConnection, RpcConnectionLost
from jobworker.errors import (
    Busy,
    CertificateRefused,
    ConnectionFailed,
    HostUnknown,
    JobworkerError,
    MessageTooLarge,
    NoService,
    NotFound,
    ProtocolError,
    ShuttingDown,
)
from jobworker.protocol import messages as m

CONNECT_SECONDS = 10.0
PATIENCE_SECONDS = 120.0
FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 5.0
START_PAUSE_SECONDS = 0.1

T = TypeVar("T")

LARGE_BYTES = 1 << 20
MOST_LOSSES = 3
"""A call fails after so many broken connections, because the call itself may be the cause. With a
request of LARGE_BYTES or more, the error is that the request is too large; with a smaller one, that
the network may be too slow for the request or its reply."""
PATIENT = frozenset({"job.wait", "job.stop"})
"""Calls that wait for a job's end, perhaps for days: any number of connections may break."""

Dial = Callable[..., Awaitable[None]]
"""Serves one connection to its end, and reports it as started: `dial.serve_connection`."""


@define(eq=False)
class _Attempt:
    """One attempt to get a connection, shared by all calls that wait for it, and its result."""

    decided: trio.Event = field(factory=trio.Event)
    failure: JobworkerError | None = None


@define(eq=False)
class _Tries:
    """The history of one call's attempts, which decides whether it may be retried."""

    _uncertain: str = ""
    """For a call that is not idempotent: the remedy if a server may have executed it; else ""."""
    _on_asked: Callable[[bool], None] | None = None
    may_have_been_done: bool = field(default=False, init=False)
    """Whether an earlier request may have reached a server, and its reply was lost."""
    _losses: int = field(default=0, init=False)

    def report_asked(self, sent: bool) -> None:
        """Call the callback with whether a server may have the request; `sent`: the latest may."""
        if self._on_asked is not None:
            self._on_asked(self.may_have_been_done or sent)

    def lose(self, lost: RpcConnectionLost, name: str) -> None:
        """Record that the connection was lost. Raises if the call must not be retried."""
        self.may_have_been_done = self.may_have_been_done or lost.sent
        self._losses += lost.broke and name not in PATIENT
        if self.may_have_been_done and self._uncertain:
            reason = lost.reason
            if isinstance(reason, CertificateRefused | ProtocolError):
                raise type(reason)(
                    reason.message, remedy=f"{self._uncertain}; {reason.remedy}"
                ) from None
            raise ConnectionFailed(reason.message, remedy=self._uncertain) from None
        if isinstance(lost.reason, ProtocolError):
            raise lost.reason from None
        if self._losses < MOST_LOSSES:
            return
        if lost.size >= LARGE_BYTES:
            raise MessageTooLarge(
                f"cannot call {name}: {self._losses} connections broke under this request of "
                f"{lost.size} bytes as JSON; the last one: {lost.reason.message}",
                remedy="send a smaller request, or raise limits.max_message_bytes of the server",
            ) from None
        raise ConnectionFailed(
            f"cannot call {name}: {self._losses} connections broke before the reply had arrived; "
            f"the last one: {lost.reason.message}",
            remedy="is the network too slow for the reply? request less at once, such as a shorter "
            "list (for worker-cli: --limit)",
        ) from None


@define(eq=False, kw_only=True)
class Calls:
    """Calls methods of the protocol at one server, and keeps the connection to it."""

    _address: Address
    _dial: Dial = field(repr=False)
    _patience_seconds: float = PATIENCE_SECONDS
    _start_patience_seconds: float = 0
    _on_refused: Callable[[JobworkerError], None] | None = field(default=None, repr=False)
    _on_lost: Callable[[JobworkerError], None] | None = field(default=None, repr=False)
    _rpc: RpcConnection | None = field(default=None, init=False, repr=False)
    _attempt: "_Attempt" = field(factory=_Attempt, init=False, repr=False)
    _wanted: trio.Event = field(factory=trio.Event, init=False, repr=False)

    async def call(
        self,
        name: str,
        params: object,
        result: type[T],
        *,
        gone: T | None = None,
        on_asked: Callable[[bool], None] | None = None,
    ) -> T:
        """Call an idempotent method of the protocol by name; retry it until there is a reply.

        `on_asked` is called with whether a server may have the request, whenever that changes.

        `gone` is the result if the reply of an earlier attempt was lost and a later attempt gets
        NotFound: the earlier one has removed the object.
        """
        tries = _Tries(on_asked=on_asked)
        try:
            return (await self._call(name, params, result, tries))[1]
        except NotFound:
            if gone is None or not tries.may_have_been_done:
                raise
            return gone

    async def open_following(self, params: m.LogParams) -> Following:
        """Open a subscription. It ends with the connection on which it is opened."""
        rpc, result = await self._call("job.log", params, m.LogResult, _Tries())
        return rpc.following(result.subscription, result.offset, result.starts)

    async def call_once(
        self, name: str, params: object, result: type[T], uncertain: str
    ) -> tuple[RpcConnection, T]:
        """Call a method that must not be executed twice.

        If the reply is lost and the server may have the request, raises ConnectionFailed with the
        remedy `uncertain`. If the server certainly does not have the request, retries it.
        """
        return await self._call(name, params, result, _Tries(uncertain))

    async def _call(
        self, name: str, params: object, result: type[T], tries: _Tries
    ) -> tuple[RpcConnection, T]:
        while True:
            rpc = await self._connected()
            try:
                return rpc, await rpc.call(name, params, result, tries.report_asked)
            except RpcConnectionLost as lost:
                tries.lose(lost, name)
                if self._patience_seconds <= 0:
                    raise lost.reason from None
            except ShuttingDown:
                tries.report_asked(False)
                # Wait for a new connection: if a retry on this one lost its reply, the caller
                # could not know whether the request was executed.
                with trio.move_on_after(self._patience_seconds):
                    await rpc.lost.wait()
                if rpc.failure is None or self._patience_seconds <= 0:
                    raise

    async def _connected(self) -> RpcConnection:
        """Wait for a connection. Raises the reason if there is none."""
        while self._rpc is None or self._rpc.failure is not None:
            attempt = self._attempt
            self._wanted.set()
            await attempt.decided.wait()
            if attempt.failure is not None:
                raise copied(attempt.failure)
        return self._rpc

    # --- the task that keeps a connection ---------------------------------------------------

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep a connection; reports `started` after the first one. Raises if that one fails."""
        lost = await self._serve_first_connection(task_status.started)
        while self._patience_seconds > 0:
            await self._wanted.wait()
            if self._on_lost is not None:
                self._on_lost(lost)
            try:
                lost = await self._serve_next_connection(lost)
            except JobworkerError as refused:
                lost = refused
                self._decide(refused)
        self._decide(lost, for_good=True)

    async def _serve_first_connection(self, on_started: Callable[[], None]) -> JobworkerError:
        """Call `_serve_connection`; retry for the start patience: a service may be restarting."""
        patience_ends = trio.current_time() + self._start_patience_seconds
        reported = False
        while True:
            try:
                return await self._serve_connection(on_started)
            except ConnectionFailed as failed:
                over = trio.current_time() >= patience_ends
                if over or isinstance(failed, HostUnknown | NoService):
                    raise
                if self._on_refused is not None and not reported:
                    self._on_refused(failed)
                reported = True
            await trio.sleep(START_PAUSE_SECONDS * random.uniform(0.5, 1))  # noqa: S311

    async def _serve_next_connection(self, lost: JobworkerError) -> JobworkerError:
        """Dial until there is a connection, and serve it to its end.

        Returns why the connection was lost. Raises if there is none when the patience is over.
        """
        patience_ends = trio.current_time() + self._patience_seconds
        pause = FIRST_PAUSE_SECONDS
        while True:
            # A random pause: after a restart, not all clients must connect at the same time.
            await trio.sleep(pause * random.uniform(0.5, 1))  # noqa: S311
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            try:
                return await self._serve_connection(lambda: None)
            except (ConnectionFailed, Busy):
                if trio.current_time() >= patience_ends:
                    raise
            except CertificateRefused as refused:
                if not isinstance(lost, CertificateRefused) or lost.message == refused.message:
                    raise
                why = refused.message.removeprefix("cannot connect: ")
                raise CertificateRefused(
                    f"{lost.message}; connecting again: {why}", remedy=lost.remedy
                ) from None

    async def _serve_connection(self, on_started: Callable[[], None]) -> JobworkerError:
        """Dial once, and serve the connection to its end.

        Returns why the connection was lost. Raises if there is none.
        """
        refusal: JobworkerError | None = None
        failure: JobworkerError | None = None
        async with trio.open_nursery() as nursery:
            try:
                with _connecting(self._address):
                    connection = await nursery.start(self._dial)
            except JobworkerError as error:  # raised after the nursery, which would wrap it
                refusal = error
            else:
                self._rpc = rpc = RpcConnection(connection)
                nursery.start_soon(rpc.serve_writer)
                nursery.start_soon(rpc.serve_reader)
                nursery.start_soon(rpc.serve_watch)
                self._decide(None)
                on_started()
                await rpc.lost.wait()
                failure = rpc.failure
            nursery.cancel_scope.cancel()
        if refusal is not None:
            raise refusal
        assert failure is not None
        return failure

    def _decide(self, failure: JobworkerError | None, *, for_good: bool = False) -> None:
        """End the current attempt: wake the calls that wait for it, which raise a `failure`.

        A later call then starts a new attempt; after `for_good`, it raises `failure` too.
        """
        attempt = self._attempt
        if attempt.decided.is_set():  # it was final
            return
        attempt.failure = failure
        attempt.decided.set()
        self._wanted = trio.Event()
        if not for_good:
            self._attempt = _Attempt()

    async def aclose(self, *, goodbye: bool = True) -> None:
        """Close the connection: waiting and later calls raise ConnectionFailed.

        With `goodbye`, send a closing frame first, which takes at most a second. Without it, this
        does not wait.
        """
        if goodbye and self._rpc is not None:
            await self._rpc.connection.aclose()
        closed = ConnectionFailed(
            "cannot call the server: this client is closed",
            remedy="make calls inside the block of open_client",
        )
        self._patience_seconds = 0
        if self._rpc is not None:
            self._rpc.lose(closed)
        self._decide(closed, for_good=True)


@contextmanager
def _connecting(address: Address) -> Iterator[None]:
    try:
        with trio.fail_after(CONNECT_SECONDS):
            yield
    except trio.TooSlowError:
        raise ConnectionFailed(
            f"cannot connect to {address}: no answer within {CONNECT_SECONDS:.0f} s",
            remedy="is a firewall in between? check the address (for worker-cli: --server or "
            "WORKER_SERVER)",
        ) from None
