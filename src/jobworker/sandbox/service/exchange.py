"""Sends requests to the launcher over one socket, and receives replies and events.

Requests may overlap: a reply has the number of its request. `sandbox.protocol.operations` has the
format of each request and reply. When the launcher ends, every waiting request fails at once
(`LauncherGone`); none hangs.

A reply that the protocol does not allow fails its own request. An event that it does not allow ends
the conversation as if the launcher had ended, with a line in the log, and so does a packet that is
no message. The reason: such an event may be the end of a job, and would be lost otherwise.
"""

import errno
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
from jobworker.sandbox.service.launcher_refusals import explain

log = logging.getLogger("jobworker.sandbox")

SILENT_SECONDS = 10.0
"""The launcher is silent if it answers nothing for so long. Its turns take milliseconds
(`sandbox.event_loop`)."""
LOOK_SECONDS = 1.0
SEND_AGAIN_SECONDS = 0.1
LONG_PIECE = 16_384
"""After so many characters of a request, which take 0.25 ms to encode, other tasks run."""

Q = TypeVar("Q", bound=Request)
A = TypeVar("A", bound=ops.Reply)


class Waitable(Protocol):
    """A condition to wait for, such as a trio.Event."""

    def is_set(self) -> bool:
        """Whether the condition holds."""

    async def wait(self) -> None:
        """Wait until the condition holds."""


@define(eq=False)
class _Waiting:
    """A request without a reply yet, and then its reply."""

    may_be_large: bool
    """Whether the reply may travel in a memfd."""
    answered: trio.Event = Factory(trio.Event)
    message: channel.Message | None = None
    descriptors: list[int] = Factory(list)
    descriptors_lost: bool = False
    """Whether descriptors of the reply were lost, because this process can open no more."""


@define(eq=False)
class Exchange:
    """The service's end of the socket to the launcher."""

    _sock: trio.socket.SocketType
    _on_event: Callable[[events.Event], None]
    _waiting: dict[int, _Waiting] = Factory(dict)
    _next: int = 1
    _sending: trio.StrictFIFOLock = Factory(trio.StrictFIFOLock)
    _unsent: dict[trio.CancelScope, bool] = Factory(dict)
    """Messages that wait for the lock or for room in the socket, and whether each is patient."""
    given_up: bool = False
    """Whether `give_up` was called: no further request is sent."""
    silent: bool = False
    """Whether the launcher runs and has not answered for `SILENT_SECONDS`."""
    gone: trio.Event = Factory(trio.Event)
    """Set once the launcher has ended. Then none of its jobs is alive."""

    async def request(self, operation: ops.Operation[Q, A], request: Q) -> tuple[A, list[int]]:
        """Send a request and return its reply, with the descriptors that the caller now owns.

        The call is shielded from cancellation, because a request that was sent has its effect. It
        ends when the launcher answers or ends, or when this service ends (`give_up`). If the
        launcher is silent, a request that is not patient raises LauncherSilent. A patient request,
        on which the life of a job depends, waits until the launcher answers again. Raises the
        error that `start_failures.explain` makes of a refusal, and SandboxError for a reply that
        the protocol does not allow.
        """
        number, waiting = self._expect(operation.may_be_large)
        with trio.CancelScope(shield=True):
            try:
                message = ops.request_message(number, request)
                await self._send(message, patient=operation.is_patient)
            except JobworkerError:  # the request was not sent
                self._waiting.pop(number, None)
                raise
            if operation.is_patient:
                await waiting.answered.wait()
            else:
                await self.wait_unless_silent(waiting.answered)
        if waiting.descriptors_lost:
            raise errors.out_of_descriptors(of_reply=True)
        if waiting.message is None:
            raise errors.launcher_gone() if self.gone.is_set() else errors.unanswered()
        try:
            return _reply_of(operation, waiting), waiting.descriptors
        except BaseException:
            channel.close_all(waiting.descriptors)
            raise

    async def send(self, request: Request) -> None:
        """Send a request without waiting for its reply, which is dropped."""
        number, self._next = self._next, self._next + 1
        await self._send(ops.request_message(number, request))

    def _expect(self, may_be_large: bool) -> tuple[int, _Waiting]:
        number, self._next = self._next, self._next + 1
        waiting = self._waiting[number] = _Waiting(may_be_large)
        return number, waiting

    # --- whether the launcher answers -------------------------------------------------------

    async def wait_unless_silent(self, event: Waitable) -> None:
        """Wait for `event`, which only the launcher can cause. Raises LauncherSilent meanwhile."""
        while not event.is_set():
            if self.silent:
                raise errors.launcher_silent()
            with trio.move_on_after(LOOK_SECONDS):
                await event.wait()

    async def watch_silence(self) -> None:
        """Set `silent` while the launcher answers nothing; never returns.

        While requests wait, this pings the launcher. A waiting request alone is no sign of silence,
        since some take long.
        """
        while True:
            await trio.sleep(LOOK_SECONDS)
            if not self._waiting or self.given_up:
                continue
            with trio.move_on_after(SILENT_SECONDS):
                await self._ping()
                continue
            await self._wait_out_silence()

    async def _ping(self) -> bool:
        """Send a ping and return whether its answer came. The caller may cancel it."""
        number, waiting = self._expect(may_be_large=False)
        try:
            await self._send(ops.request_message(number, Ping()))
            await waiting.answered.wait()
            return waiting.message is not None
        except JobworkerError:  # `give_up` was called before the ping was sent
            return False
        finally:
            self._waiting.pop(number, None)

    async def _wait_out_silence(self) -> None:
        """Set `silent` until the launcher answers a ping or ends. Fails impatient requests."""
        log.error("the launcher has not answered for %.0f s: see what holds it", SILENT_SECONDS)
        self.silent = True
        for unsent, patient in self._unsent.items():
            if not patient:
                unsent.cancel()
        try:
            if await self._ping():  # if not, the launcher has ended, or `give_up` was called
                log.warning("the launcher answers again")
        finally:
            self.silent = False

    # --- the socket -------------------------------------------------------------------------

    async def _send(self, message: channel.Message, *, patient: bool = True) -> None:
        """Send a message as soon as the socket has room for it.

        Raises LauncherGone or LauncherSilent if `give_up` is called before that, or if the launcher
        is silent and the message not `patient`. Then no part of the message was sent: the socket
        takes a packet as a whole. Raises OutOfDescriptors for a large message without a memfd.
        """
        body = await _body_of(message)
        if self.given_up or (self.silent and not patient):
            raise self._not_sent()
        try:
            packet, ancillary, mine = channel.pack(body, ())
        except OSError as error:  # a large message travels in a memfd
            raise errors.out_of_descriptors() from error
        with trio.CancelScope() as scope:
            self._unsent[scope] = patient
            try:
                while not await self._try_to_send(packet, ancillary):  # noqa: ASYNC110 - no event
                    await trio.sleep(SEND_AGAIN_SECONDS)
            except OSError:
                await self.gone.wait()  # the launcher has ended; `serve` reads that and sets `gone`
            finally:
                del self._unsent[scope]
                channel.close_all(mine)
        if scope.cancelled_caught:
            raise self._not_sent()

    async def _try_to_send(self, packet: bytes, ancillary: channel.Ancillary) -> bool:
        """Send a packet. Returns False if the kernel lacks memory for it. Raises OSError."""
        try:
            self._sending.acquire_nowait()  # acquire() would always run other tasks first
        except trio.WouldBlock:
            await self._sending.acquire()
        try:
            await self._sock.sendmsg([packet], ancillary, socket.MSG_NOSIGNAL)
        except OSError as error:
            if error.errno not in (errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS):
                raise
            return False
        finally:
            self._sending.release()
        return True

    def _not_sent(self) -> JobworkerError:
        if self.gone.is_set():
            return errors.launcher_gone()
        return errors.not_sent() if self.given_up else errors.launcher_silent()

    async def serve(self) -> None:
        """Receive replies and events, until the launcher has ended and all requests have failed."""
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
            log.error("the launcher breaks the protocol, so the service leaves it: %s", fault)
        except OSError:
            return  # a reset connection is the launcher's end as well
        finally:
            self.gone.set()
            self.give_up()

    def give_up(self) -> None:
        """Fail all requests that wait for an answer or to be sent, and send no more."""
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
        """Fail the request whose reply came without its descriptors.

        If `message` is None, its number was lost too, so this fails every request whose reply may
        be large. A failed request may have had its effect.
        """
        for number, waiting in list(self._waiting.items()):
            if message.get("id") == number if message else waiting.may_be_large:
                del self._waiting[number]
                waiting.descriptors_lost = True
                waiting.answered.set()


def _reply_of(operation: ops.Operation[Q, A], waiting: _Waiting) -> A:
    """The launcher's reply. Raises the error for a refusal or a reply that is malformed."""
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
    """The encoded message. Other tasks run while a long one is encoded."""
    body, made = list[str](), 0
    for piece in channel.pieces(message):
        body.append(piece)
        made += len(piece)
        if made > LONG_PIECE:
            made = 0
            await trio.lowlevel.checkpoint()
    return "".join(body).encode()
