"""One open connection's traffic: calls and replies, output, pings, and a closing frame.

    reader: a task for each call ─► reply ─► its subscription, if it opened one
    pings

The reader never waits for a job. It waits for its client's turn (`fair_scheduling`), for a large
request to be served, and while too many replies are unsent or too many notifications are being
served. It also waits for its connection's calls while all calls of the client's name cost too much
memory (`call_budget`). So the server still reads the credits of a client whose requests all wait
for jobs. The server makes long replies one at a time, each when the client has taken the one before
it. Large requests and replies need a slot (`slots`). So a client that sends requests and reads no
replies delays only itself (backpressure), and all of its connections together cost a bounded amount
of memory.
"""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress

import trio
from attrs import define, field
from trio_websocket import ConnectionClosed

from jobworker.errors import (
    Busy,
    InternalError,
    JobworkerError,
    MessageTooLarge,
    PermissionDenied,
    TooManyFollows,
    TooManyFrames,
    TooManyRequests,
    TooSlow,
)
from jobworker.jobs.output.batched_wakeups import cancel_in_batches
from jobworker.model.access import Permission
from jobworker.protocol.closing import TOO_BIG
from jobworker.protocol.frames import frame_text
from jobworker.protocol.messages import Nothing, opened_by
from jobworker.protocol.methods import METHODS, Method
from jobworker.protocol.session import (
    InvalidRequest,
    RpcRequest,
    ServerSession,
    error_message,
    read_request,
)
from jobworker.serialization.json_text import takes_long
from jobworker.server.access.authorization import Caller
from jobworker.server.access.connected_clients import ConnectedClient
from jobworker.server.connections.framed_socket import FramedSocket
from jobworker.server.delivery.subscriptions import Subscriptions
from jobworker.server.fairness.call_budget import CallCost, ConnectionCalls
from jobworker.server.fairness.slots import LARGE_BYTES
from jobworker.server.requests import operations, watches
from jobworker.server.requests.read_backpressure import ReadBackpressure, refusal_of_large
from jobworker.server.requests.sending import Sender
from jobworker.token_bucket import TokenBucket

IN_ORDER = frozenset({"job.credit", "job.unfollow"})
"""Notifications that wait for nothing. They are done before the client's next message is served."""
IN_TURN = frozenset({"job.list", "job.status", "job.plan", "volume.list", "rpc.discover"})
"""Calls that wait for nothing and may have long replies: one at a time on each connection."""
LARGE_REQUESTS = frozenset({"job.run", "job.plan"})
"""Methods whose parameters may be large. Any other large request was padded."""
SMALL_FRAMES_BURST, SMALL_FRAMES_PER_SECOND = 1000, 20
"""Token bucket for control frames and short parts of messages (`frame_scan`).

Clients ping once a second at the most, and answer our pings, which come twice a minute.
"""


@define(eq=False)
class Conversation:
    """The server's side of one open connection: reads calls, serves them, and sends the replies."""

    _socket: FramedSocket
    _client: ConnectedClient
    _context: operations.OperationContext
    _session: ServerSession = field(init=False)
    _subscriptions: Subscriptions = field(init=False)
    _sender: Sender = field(init=False)
    _calls: set[trio.CancelScope] = field(factory=set)
    """The scopes of the tasks that serve calls."""
    _busy: int = 0
    """How many replies are being sent, and notifications are being served."""
    _less_busy: trio.lowlevel.ParkingLot = field(factory=trio.lowlevel.ParkingLot)
    """Here tasks wait until a reply has been sent, or a notification has been served."""
    _small_frames: TokenBucket = field(init=False)
    intake: ReadBackpressure = field(init=False)
    _costs: ConnectionCalls = field(init=False)
    """What the calls that are being served cost."""
    _turn: trio.StrictFIFOLock = field(factory=trio.StrictFIFOLock)
    """Held by the one call of `IN_TURN` that is being answered."""

    def __attrs_post_init__(self) -> None:
        limits = self._context.limiter.limits
        self._sender = Sender(self._socket, self._client, self._context.limiter)
        self._session = ServerSession(limits.max_requests_in_flight)
        self._small_frames = TokenBucket(
            trio.current_time(), SMALL_FRAMES_BURST, SMALL_FRAMES_PER_SECOND
        )
        self._costs = self._context.calls.connection(self._client.identity.common_name)
        self.intake = ReadBackpressure(
            self._context.requests,
            self._client.identity.common_name,
            self._context.stall_seconds,
            self._context.active_clients,
        )
        self._subscriptions = Subscriptions(
            self._context.supervisor,
            self._context.send_budget,
            self._context.stall_seconds,
            limits.max_follows,
            self._context.waits,
            self._client.identity.common_name,
        )

    async def wait_for_room(self, size: int) -> float:
        """Wait until the rest of a message may be read, of which `size` bytes have come.

        Returns what `ReadBackpressure.wait_for_room` returns. If the client has sent too many small
        frames, or its large message too slowly, the conversation ends and this never returns.
        """
        small = self._socket.take_small_frames()
        if small and not self._small_frames.take(trio.current_time(), small):
            self._sender.end(
                TooManyFrames(
                    f"cannot take more than {SMALL_FRAMES_PER_SECOND} control frames and short "
                    f"parts of messages a second, after {SMALL_FRAMES_BURST} at once"
                )
            )
            await trio.sleep_forever()
        try:
            return await self.intake.wait_for_room(size)
        except TooSlow as slow:
            self._sender.end(slow)
            await trio.sleep_forever()

    async def _in_scope(self, serve: Callable[..., Awaitable[None]], *arguments: object) -> None:
        with trio.CancelScope() as scope:
            self._calls.add(scope)
            try:
                await serve(*arguments)
            finally:
                self._calls.discard(scope)

    def refuses_large(self) -> bool:
        """Whether the client may send no large message, since it may not run jobs."""
        return self._denied(METHODS["job.run"]) is not None

    async def serve(self) -> None:
        """Answer calls until the client closes, or the server ends the conversation."""
        try:
            async with trio.open_nursery() as calls:
                try:
                    with self._sender.scope:
                        async with trio.open_nursery() as nursery:
                            nursery.start_soon(
                                watches.ping,
                                self._socket,
                                self.intake,
                                self._context.limiter.limits,
                                self._sender.end,
                            )
                            nursery.start_soon(watches.show_life, self._socket, self.intake)
                            # ConnectionClosed does not leave the nursery: Python keeps the frames
                            # of an exception group until it next collects cycles.
                            with suppress(ConnectionClosed):
                                while True:
                                    await self._take(await self._next_message(), calls)
                            nursery.cancel_scope.cancel()
                finally:
                    self._sender.stop()
                    await cancel_in_batches(self._calls)
                    calls.cancel_scope.cancel()
        finally:
            closed = self._socket.closed
            if closed is not None and closed.code == TOO_BIG:
                limit = self._context.limiter.limits.max_message_bytes
                self._sender.record_limit(
                    MessageTooLarge(f"cannot take a message of more than {limit} bytes")
                )
            self._subscriptions.close()
            self.intake.close()

    async def end_when_dismissed(self) -> None:
        """Wait until the list of connected clients dismisses the client (`connected_clients`), then
        end the conversation.

        If the service ends, the client first gets what the server owes it: replies, and output
        whose end is known. The service bounds that time.
        """
        try:
            await self._client.leaving.wait()
            while not self._client.reason and self._owes:
                await self._less_busy.park()
            await self._sender.finish()
        finally:  # also if this task is cancelled before
            self._sender.cancel()

    async def say_goodbye(self) -> bool:
        """See `Sender.say_goodbye`."""
        return await self._sender.say_goodbye()

    @property
    def _owes(self) -> bool:
        return bool(self._session.in_flight or self._busy or self._subscriptions.owe)

    async def _next_message(self) -> str | bytes:
        """Read the next message, and wait until a turn of the client's name has come."""
        message = await self._socket.get_message()
        name = self._client.identity.common_name
        self._context.active_clients.mark_active(name)
        await self._context.messages.wait_turn(name)
        return message

    async def _take(self, message: str | bytes, calls: trio.Nursery) -> None:
        """Serve a message, or have a task serve it.

        The reader waits until a large request is served, since the request holds memory. A request
        that was only padded holds no memory any more, and may wait for a job, so the reader goes on
        to the next message.
        """
        large = len(message) > LARGE_BYTES
        if large:
            calls.start_soon(
                watches.end_unless_served,
                self.intake.begin(),
                self._context.stall_seconds,
                self._sender.end,
            )
        received = await self._read(message)
        del message
        with self.intake.stop():
            # Requests that wait for a job do not count here: credits behind them must be read.
            while self._busy >= self._context.limiter.limits.max_requests_in_flight:
                await self._less_busy.park()
            await self._costs.wait_for_room()
            if isinstance(received, InvalidRequest):
                self._note(received)
                if received.message is not None:
                    await self._sender.send(received.message)
            else:
                await self._begin(received, calls, large=large)
        if large:
            self.intake.end()

    async def _begin(self, call: RpcRequest, calls: trio.Nursery, *, large: bool) -> None:
        cost = self._costs.begin()
        if call.method.name in IN_ORDER and not call.answered:
            with cost:
                await self._outcome(call, cost)
        elif large and call.method.name in LARGE_REQUESTS:
            serve = self._answer if call.answered else self._outcome
            with cost:
                outcome = await serve(call, cost)
            calls.start_soon(self._in_scope, self._deliver, outcome)
        elif call.answered:
            calls.start_soon(self._in_scope, self._serve_call, call, cost)
        else:
            calls.start_soon(self._in_scope, self._serve_notification, call, cost)

    async def _read(self, message: str | bytes) -> RpcRequest | InvalidRequest:
        """Decode a request: a long one in a thread, a large one only if the client may run jobs."""
        if not takes_long(message):
            return self._session.receive(message, self._denied)
        if len(message) > LARGE_BYTES:
            error = refusal_of_large(message, self._denied(METHODS["job.run"]))
            if error is not None:
                return InvalidRequest(error_message(None, error), error)
        name = self._client.identity.common_name
        with self.intake.pause(), self._context.active_clients.serving(name):
            request = await self._context.reading.run(name, read_request, message, self._denied)
        return self._session.admit(request)

    def _denied(self, method: Method) -> JobworkerError | None:
        """The error if this client may not call a method, whatever its parameters; else None."""
        try:
            self._context.authorization.check_role(self._client.identity, method)
        except PermissionDenied as denied:
            return denied
        return None

    def _note(self, refused: InvalidRequest) -> None:
        """Record a refused message: in the audit unless the server was busy, and as a limit.

        It counts as a limit only if it was one request too many.
        """
        who, peer, error = self._client.identity, self._client.peer, refused.error
        if isinstance(error, PermissionDenied) and refused.method is not None:
            self._context.auditor.failed(who, peer, refused.method, Nothing(), error)
        elif not isinstance(error, Busy):  # Busy does not mean that the message is malformed
            self._context.auditor.malformed(who, peer, error)
        if isinstance(error, TooManyRequests):
            self._sender.record_limit(error)

    async def _serve_notification(self, call: RpcRequest, cost: CallCost) -> None:
        with self._being_busy(), cost:
            outcome = await self._outcome(call, cost)
        del call
        await self._deliver(outcome)

    async def _serve_call(self, call: RpcRequest, cost: CallCost) -> None:
        with cost:
            outcome = await self._answer(call, cost)
        del call  # its parameters may be large, and the delivery may take long
        await self._deliver(outcome)

    async def _answer(self, call: RpcRequest, cost: CallCost) -> object:
        """Serve a call and send the reply. Returns its outcome, which may be an error.

        A reply that may be long is made only when the one before it has been sent.
        """
        if call.method.name in IN_TURN:
            async with self._turn:
                return await self._answer_now(call, cost)
        return await self._answer_now(call, cost)

    async def _answer_now(self, call: RpcRequest, cost: CallCost) -> object:
        outcome = await self._outcome(call, cost)
        with self._being_busy():
            message = self._encode(call, outcome)
            if len(message) <= LARGE_BYTES:
                cost.add(len(message))
                await self._sender.send(message)
                return outcome
            slots, name = self._context.replies, self._client.identity.common_name
            again = False
            if not slots.acquire_nowait(name):
                again = call.method.permission is Permission.VIEW  # then a second call is harmless
                if again:
                    del outcome, message  # frees their memory while the call waits for a slot
                await slots.acquire(name)
            try:
                if again:
                    outcome = await self._outcome(call, cost)
                    message = self._encode(call, outcome)
                frame = frame_text(message)
                del message
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(
                        watches.end_unless_taken,
                        self._socket,
                        slots,
                        name,
                        self._context.stall_seconds,
                        self._sender.end,
                    )
                    await self._sender.send([frame])
                    nursery.cancel_scope.cancel()
            finally:
                slots.release(name)
        return outcome

    def _encode(self, call: RpcRequest, outcome: object) -> str:
        if isinstance(outcome, JobworkerError):
            return self._session.error(call.id, outcome)
        return self._session.result(call.id, outcome)

    @contextmanager
    def _being_busy(self) -> Iterator[None]:
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1
            self._less_busy.unpark_all()

    async def _outcome(self, call: RpcRequest, cost: CallCost) -> object:
        """Run a call. Returns its result, or its error as a value: both are sent as a reply."""
        caller = Caller(
            identity=self._client.identity,
            subscriptions=self._subscriptions,
            authorization=self._context.authorization,
            peer=self._client.peer,
            cost=cost,
        )
        try:
            return await operations.call(self._context, caller, call.method, call.params)
        except JobworkerError as error:
            if isinstance(error, TooManyFollows):
                self._sender.record_limit(error)
            return error
        except Exception:  # noqa: BLE001 - recorded
            incident = self._context.incidents.record("call", call.method.name)
            return InternalError(
                f"cannot serve {call.method.name}: an internal fault (incident {incident})",
                remedy="give the incident's number to the service's administrator",
            )

    async def _deliver(self, outcome: object) -> None:
        """Send the output of the subscription that a call has opened, if it opened one."""
        subscription = opened_by(outcome)
        if subscription is not None:
            await self._subscriptions.run(subscription, self._sender.send)
            self._less_busy.unpark_all()
