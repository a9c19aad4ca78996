"""Requests to the launcher and their replies, over one socket, and the events in between.

Requests may overlap: replies are told apart by their number. `sandbox.protocol.operations` says of
each request how it is written and how its reply is read. When the launcher goes, every waiting
request hears of it at once (`LauncherGone`); nothing hangs.

A reply that the protocol does not allow fails its own request. An event that it does not allow ends
the conversation as the launcher's end does, with a word in the log, and so does a packet that is no
message: an event may be the end of a job, which nobody would hear of otherwise.
"""

import logging
import socket
from collections.abc import Callable
from typing import Protocol, TypeVar

import trio
from attrs import Factory, define

from jobworker.errors import JobworkerError
from jobworker.sandbox import channel
from jobworker.sandbox.protocol import events, fields
from jobworker.sandbox.protocol import operations as ops
from jobworker.sandbox.protocol.replies import Refusal
from jobworker.sandbox.protocol.requests import Ping, Request
from jobworker.sandbox.service import launcher_errors as errors
from jobworker.sandbox.service.start_failures import explain

log = logging.getLogger("jobworker.sandbox")

SILENT_SECONDS = 10.0
"""The launcher's turns take milliseconds (`sandbox.event_loop`)."""
LOOK_SECONDS = 1.0
LONG_PIECE = 16_384
"""Characters of a request after which other tasks have their turn: a quarter of a millisecond."""

Q = TypeVar("Q", bound=Request)
A = TypeVar("A", bound=ops.Reply)


class Waitable(Protocol):
    """An event, such as trio.Event."""

    def is_set(self) -> bool:
        """Whether it has happened."""

    async def wait(self) -> None:
        """Wait until it has."""


@define(eq=False)
class _Waiting:
    """A request on its way."""

    may_be_large: bool
    """Whether its reply may travel in a descriptor."""
    answered: trio.Event = Factory(trio.Event)
    message: channel.Message | None = None
    descriptors: list[int] = Factory(list)
    descriptors_lost: bool = False
    """Whether this process had no room for what came with the reply."""


@define(eq=False)
class Exchange:
    """The service's end of the socket."""

    _sock: trio.socket.SocketType
    _on_event: Callable[[events.Event], None]
    _waiting: dict[int, _Waiting] = Factory(dict)
    _next: int = 1
    _sending: trio.StrictFIFOLock = Factory(trio.StrictFIFOLock)
    _unsent: dict[trio.CancelScope, bool] = Factory(dict)
    """Of what waits for its turn to be sent, or for room in the socket: whether it is patient."""
    given_up: bool = False
    """Whether the launcher is asked nothing more, as after `give_up`."""
    silent: bool = False
    """Whether the launcher is there and has not answered for `SILENT_SECONDS`."""
    gone: trio.Event = Factory(trio.Event)
    """Set once the launcher has ended; no job of it is alive then."""

    async def ask(self, operation: ops.Operation[Q, A], request: Q) -> tuple[A, list[int]]:
        """Send a request and wait for its reply.

        A request that went out has its effect, so whoever waits is shielded, until the launcher
        answers or ends, or is given up at the end of this service. A request that is not patient
        raises LauncherSilent where the launcher does neither; the rest, on which jobs' lives
        depend, goes on when it does. Raises what the launcher has refused, and SandboxError for a
        reply that the protocol does not allow.
        """
        number, waiting = self._expect(operation.may_be_large)
        with trio.CancelScope(shield=True):
            try:
                message = ops.request_message(number, request)
                await self._send(message, patient=operation.is_patient)
            except JobworkerError:  # nothing went out
                self._waiting.pop(number, None)
                raise
            if operation.is_patient:
                await waiting.answered.wait()
            else:
                await self.wait_unless_silent(waiting.answered)
        if waiting.descriptors_lost:
            raise errors.out_of_descriptors()
        if waiting.message is None:
            raise errors.launcher_gone() if self.gone.is_set() else errors.unanswered()
        try:
            return _reply_of(operation, waiting), waiting.descriptors
        except BaseException:
            channel.close_all(waiting.descriptors)
            raise

    async def tell(self, request: Request) -> None:
        """Send a request whose reply nobody waits for."""
        number, self._next = self._next, self._next + 1
        await self._send(ops.request_message(number, request))

    def _expect(self, may_be_large: bool) -> tuple[int, _Waiting]:
        number, self._next = self._next, self._next + 1
        waiting = self._waiting[number] = _Waiting(may_be_large)
        return number, waiting

    # --- whether the launcher answers -------------------------------------------------------

    async def wait_unless_silent(self, event: Waitable) -> None:
        """Wait for what only a launcher that answers can bring about. Raises LauncherSilent."""
        while not event.is_set():
            if self.silent:
                raise errors.launcher_silent()
            with trio.move_on_after(LOOK_SECONDS):
                await event.wait()

    async def listen(self) -> None:
        """Notice where the launcher answers nothing (`silent`); never returns.

        A request alone cannot tell, since some take long: so it is asked for a mere answer.
        """
        while True:
            await trio.sleep(LOOK_SECONDS)
            if not self._waiting or self.given_up:
                continue
            with trio.move_on_after(SILENT_SECONDS):
                await self._ping()
                continue
            await self._be_silent()

    async def _ping(self) -> bool:
        """Ask for an answer, and nothing else: whether one came. May be cancelled."""
        number, waiting = self._expect(may_be_large=False)
        try:
            await self._send(ops.request_message(number, Ping()))
            await waiting.answered.wait()
            return waiting.message is not None
        except JobworkerError:  # it was given up before that was sent
            return False
        finally:
            self._waiting.pop(number, None)

    async def _be_silent(self) -> None:
        log.error("the launcher has not answered for %.0f s: see what holds it", SILENT_SECONDS)
        self.silent = True
        for unsent, patient in self._unsent.items():
            if not patient:
                unsent.cancel()
        try:
            if await self._ping():  # else it is gone, or was given up
                log.warning("the launcher answers again")
        finally:
            self.silent = False

    # --- the socket -------------------------------------------------------------------------

    async def _send(self, message: channel.Message, *, patient: bool = True) -> None:
        """Send a message as soon as there is room for it.

        Raises LauncherSilent or LauncherGone where the launcher is given up before, or is silent
        and the message not `patient`. Nothing of it went out then: the socket takes a packet as a
        whole.
        """
        body = await _body_of(message)
        if self.given_up or (self.silent and not patient):
            raise self._not_sent()
        try:
            packet, ancillary, mine = channel.pack(body, ())
        except OSError as error:  # a large message travels in a descriptor
            raise errors.out_of_descriptors() from error
        with trio.CancelScope() as scope:
            self._unsent[scope] = patient
            try:
                try:
                    self._sending.acquire_nowait()  # a turn of the loop less
                except trio.WouldBlock:
                    await self._sending.acquire()
                try:
                    await self._sock.sendmsg([packet], ancillary, socket.MSG_NOSIGNAL)
                finally:
                    self._sending.release()
            except OSError:
                await self.gone.wait()  # the reader sees the end of the stream too
            finally:
                del self._unsent[scope]
                channel.close_all(mine)
        if scope.cancelled_caught:
            raise self._not_sent()

    def _not_sent(self) -> JobworkerError:
        if self.gone.is_set():
            return errors.launcher_gone()
        return errors.not_sent() if self.given_up else errors.launcher_silent()

    async def serve(self) -> None:
        """Hand out what the launcher sends; returns once it is gone, everyone woken."""
        try:
            while True:
                packet, ancillary, flags, _ = await self._sock.recvmsg(
                    channel.PACKET_BYTES, channel.ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
                )
                if not packet:
                    return
                try:
                    message, descriptors = channel.decode(packet, ancillary, flags)
                except channel.DescriptorsLost as cut:
                    channel.close_all(cut.descriptors)
                    self._dispatch_without_descriptors(cut.said)
                except channel.BadMessage as bad:
                    channel.close_all(bad.descriptors)
                    raise
                else:
                    self._dispatch(message, descriptors)
        except (fields.Malformed, JobworkerError) as fault:
            log.error("the launcher does not keep to the protocol, and is left: %s", fault)
        except OSError:
            return  # reset: the same as its end
        finally:
            self.gone.set()
            self.give_up()

    def give_up(self) -> None:
        """Ask nothing more: no request waits longer, be it for an answer or to be sent."""
        self.given_up = True
        for unsent in self._unsent:
            unsent.cancel()
        for waiting in self._waiting.values():
            waiting.answered.set()
        self._waiting.clear()

    def _dispatch(self, message: channel.Message, descriptors: list[int]) -> None:
        answered = message.get("id")
        waiting = self._waiting.pop(answered, None) if isinstance(answered, int) else None
        if waiting is not None:
            waiting.message, waiting.descriptors = message, descriptors
            waiting.answered.set()
            return
        channel.close_all(descriptors)
        if (event := events.read(message)) is not None:
            self._on_event(event)

    def _dispatch_without_descriptors(self, message: channel.Message | None) -> None:
        """Fail the request whose reply came in part; where it cannot be told which, all it may be.

        Such a request had its effect, or has to be made again.
        """
        for number, waiting in list(self._waiting.items()):
            if message.get("id") == number if message else waiting.may_be_large:
                del self._waiting[number]
                waiting.descriptors_lost = True
                waiting.answered.set()


def _reply_of(operation: ops.Operation[Q, A], waiting: _Waiting) -> A:
    """What the launcher has answered. Raises what it has refused."""
    assert waiting.message is not None
    try:
        reply = ops.read_reply(operation, waiting.message)
    except fields.Malformed as fault:
        raise errors.malformed(fault) from None
    if isinstance(reply, Refusal):
        raise explain(reply)
    if operation.descriptors is not None and len(waiting.descriptors) != operation.descriptors:
        number = len(waiting.descriptors)
        raise errors.malformed(f"the reply to {operation.name} came with {number} descriptors")
    return reply


async def _body_of(message: channel.Message) -> bytes:
    """Encode a message; other tasks have turns meanwhile where it is long."""
    body, made = list[str](), 0
    for piece in channel.pieces(message):
        body.append(piece)
        made += len(piece)
        if made > LONG_PIECE:
            made = 0
            await trio.lowlevel.checkpoint()
    return "".join(body).encode()
