"""Calls to one server, over as many connections as it takes.

One task keeps a connection (`serve`): it dials, serves the connection to its end, and dials anew
when someone next needs one, with growing pauses, until patience ends. Those who wait then get the
error; a later call begins again. The first connection must succeed: what is wrong with an address
or a certificate is told at once.

What a call does when its connection breaks depends on why (`protocol.closing`) and on what it asks
for. Asking, waiting, stopping and removing may be done twice, and are. Running a command and making
a volume may not: they are asked again only where no server can have the whole request, or a service
that is ending refused it (`shutting_down`); else the caller learns that the job may have been
started.
"""

import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import trio
from attrs import define, field

from jobworker.client.address import Address
from jobworker.client.following import Following, anew
from jobworker.client.link import Link, LinkLost
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
"""So often a call may break its connection before that is held for its fault: of a request of
LARGE_BYTES that it is too large, of another that the line is too slow for it or its answer."""
PATIENT = frozenset({"job.wait", "job.stop"})
"""Calls that wait for a job's end, for days perhaps: connections break meanwhile."""

Dial = Callable[..., Awaitable[None]]
"""Serves one connection to its end, and reports it as started: `dial.serve_connection`."""


@define(eq=False)
class _Attempt:
    """One try to have a connection, and how it went for all who wait for it."""

    decided: trio.Event = field(factory=trio.Event)
    failure: JobworkerError | None = None


@define(eq=False)
class _Tries:
    """How often one call was asked, and whether it may be asked again."""

    _uncertain: str = ""
    """Of a call that must not be carried out twice: what to do where that is not known."""
    _on_asked: Callable[[bool], None] | None = None
    may_have_been_done: bool = field(default=False, init=False)
    """Whether a server may have had the request, and its answer was lost."""
    _losses: int = field(default=0, init=False)

    def tell_asked(self, sent: bool) -> None:
        """Tell whether a server may have the request, which is on its way or was sent last."""
        if self._on_asked is not None:
            self._on_asked(self.may_have_been_done or sent)

    def lose(self, lost: LinkLost, name: str) -> None:
        """Note that the connection was lost. Raises where the call may not be asked again."""
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
                remedy="ask for less at once, or raise limits.max_message_bytes of the server",
            ) from None
        raise ConnectionFailed(
            f"cannot call {name}: {self._losses} connections broke before its answer had come; the "
            f"last one: {lost.reason.message}",
            remedy="is the line too slow for the answer? ask for less at once, such as a shorter "
            "list (of worker-cli: --limit)",
        ) from None


@define(eq=False, kw_only=True)
class Calls:
    """Calls methods of the protocol at one server, and keeps the connection for that."""

    _address: Address
    _dial: Dial = field(repr=False)
    _patience_seconds: float = PATIENCE_SECONDS
    _start_patience_seconds: float = 0
    _on_refused: Callable[[JobworkerError], None] | None = field(default=None, repr=False)
    _on_lost: Callable[[JobworkerError], None] | None = field(default=None, repr=False)
    _link: Link | None = field(default=None, init=False, repr=False)
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
        """Call a method of the protocol by name, as often as it takes to get an answer.

        `on_asked` hears whether a server may have the request, when that changes.

        `gone` is the result where the answer of an earlier try was lost, and a later one learns
        NotFound: what was to be removed is.
        """
        tries = _Tries(on_asked=on_asked)
        try:
            return (await self._call(name, params, result, tries))[1]
        except NotFound:
            if gone is None or not tries.may_have_been_done:
                raise
            return gone

    async def open_following(self, params: m.LogParams) -> Following:
        """Open a subscription; it lasts no longer than the connection that it is opened on."""
        link, result = await self._call("job.log", params, m.LogResult, _Tries())
        return link.following(result.subscription, result.offset, result.starts)

    async def call_once(
        self, name: str, params: object, result: type[T], uncertain: str
    ) -> tuple[Link, T]:
        """Call a method that must not be carried out twice.

        Where the server may have the request but its answer is lost, raises ConnectionFailed with
        the remedy `uncertain`. Where it certainly does not have it, asks again.
        """
        return await self._call(name, params, result, _Tries(uncertain))

    async def _call(
        self, name: str, params: object, result: type[T], tries: _Tries
    ) -> tuple[Link, T]:
        while True:
            link = await self._linked()
            try:
                return link, await link.call(name, params, result, tries.tell_asked)
            except LinkLost as lost:
                tries.lose(lost, name)
                if self._patience_seconds <= 0:
                    raise lost.reason from None
            except ShuttingDown:
                tries.tell_asked(False)
                # Not asked again here: an answer that is lost would leave open what became of it.
                with trio.move_on_after(self._patience_seconds):
                    await link.lost.wait()
                if link.failure is None or self._patience_seconds <= 0:
                    raise

    async def _linked(self) -> Link:
        """Wait for a connection. Raises why there is none."""
        while self._link is None or self._link.failure is not None:
            attempt = self._attempt
            self._wanted.set()
            await attempt.decided.wait()
            if attempt.failure is not None:
                raise anew(attempt.failure)
        return self._link

    # --- the task that keeps a connection ---------------------------------------------------

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep a connection; started once the first stands. Raises why that one cannot be made."""
        lost = await self._serve_first_link(task_status.started)
        while self._patience_seconds > 0:
            await self._wanted.wait()
            if self._on_lost is not None:
                self._on_lost(lost)
            try:
                lost = await self._serve_next_link(lost)
            except JobworkerError as refused:
                lost = refused
                self._decide(refused)
        self._decide(lost, for_good=True)

    async def _serve_first_link(self, tell_started: Callable[[], None]) -> JobworkerError:
        """As `_serve_link`, for as long as a restart of the service may take."""
        patience_ends = trio.current_time() + self._start_patience_seconds
        told = False
        while True:
            try:
                return await self._serve_link(tell_started)
            except ConnectionFailed as failed:
                over = trio.current_time() >= patience_ends
                if over or isinstance(failed, HostUnknown | NoService):
                    raise
                if self._on_refused is not None and not told:
                    self._on_refused(failed)
                told = True
            await trio.sleep(START_PAUSE_SECONDS * random.uniform(0.5, 1))  # noqa: S311

    async def _serve_next_link(self, lost: JobworkerError) -> JobworkerError:
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
            except CertificateRefused as refused:
                if not isinstance(lost, CertificateRefused) or lost.message == refused.message:
                    raise
                why = refused.message.removeprefix("cannot connect: ")
                raise CertificateRefused(
                    f"{lost.message}; connecting again: {why}", remedy=lost.remedy
                ) from None

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
                self._decide(None)
                tell_started()
                await link.lost.wait()
                failure = link.failure
            nursery.cancel_scope.cancel()
        if refusal is not None:
            raise refusal
        assert failure is not None
        return failure

    def _decide(self, failure: JobworkerError | None, *, for_good: bool = False) -> None:
        """Tell those who wait for a connection that it stands, or why it does not.

        Whoever wants one later starts another attempt, unless there is none `for_good`.
        """
        attempt = self._attempt
        if attempt.decided.is_set():  # for good
            return
        attempt.failure = failure
        attempt.decided.set()
        self._wanted = trio.Event()
        if not for_good:
            self._attempt = _Attempt()

    async def aclose(self, *, goodbye: bool = True) -> None:
        """Close: a call that waits, or comes later, raises ConnectionFailed.

        With `goodbye` the server is told, for at most a second; without, this does not wait.
        """
        if goodbye and self._link is not None:
            await self._link.connection.aclose()
        closed = ConnectionFailed(
            "cannot call the server: this client is closed",
            remedy="make calls inside the block of open_client",
        )
        self._patience_seconds = 0
        if self._link is not None:
            self._link.lose(closed)
        self._decide(closed, for_good=True)


@contextmanager
def _connecting(address: Address) -> Iterator[None]:
    try:
        with trio.fail_after(CONNECT_SECONDS):
            yield
    except trio.TooSlowError:
        raise ConnectionFailed(
            f"cannot connect to {address}: no answer within {CONNECT_SECONDS:.0f} s",
            remedy="is a firewall in between? check the address (of worker-cli: --server or "
            "WORKER_SERVER)",
        ) from None
