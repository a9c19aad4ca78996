"""Connection limits: how many connections may arrive or be open, and whose handshakes are delayed.

    accepted ─► arriving (half-open: TLS, HTTP request, upgrade) ─► inside (an open connection)

Arriving connections have a limit of their own, apart from open ones, so that strangers who stall
cannot take the places of clients. If one too many arrives, another leaves for it. The candidates
are those of the networks that have most of the places. The oldest one that stalls leaves: it has
sent nothing, or does not go on. If none stalls, the oldest one without a certificate leaves; those
of an address that is slowed down leave first. An honest client arrives within milliseconds. (sshd's
MaxStartups has the same aim, and drops the newcomer by lot.)

An address whose handshakes keep failing is slowed down: its handshakes begin one after the other,
in an order drawn by lot (`lottery`), so it uses a bounded part of the processor for signatures. It
is not shut out, since a program behind the same address could then keep an administrator away.
Every newcomer has the same chance of a place. If there is none, the server closes the connection at
once, which costs next to nothing (`refusal`), and the client tries again. On the service's own host
each user is slowed down alone (`local_user`), and all jobs together as one user. So no user and no
job delays another account. A client that closes before it has sent its hello, such as a health
check, has not failed.

Each limit has an error of its own name. Each refusal is counted, and each error is logged at most
once a second, since a flood must not become a flood of log lines.
"""

import ipaddress
import logging
import math
from collections import Counter
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager

import trio
from attrs import define, field, frozen

from jobworker.config.limits import ConnectionLimits
from jobworker.errors import (
    HandshakeTooSlow,
    JobworkerError,
    TooManyConnections,
    TooManyFailures,
    TooManyHandshakes,
)
from jobworker.model.fair_share import may_take_one_more
from jobworker.model.units import parse_duration
from jobworker.server.fairness.handshake_lottery import HandshakeLottery
from jobworker.server.reporting.counters import (
    CONNECTIONS,
    HANDSHAKES_FAILED,
    LIMITS_REACHED,
    Counters,
)

log = logging.getLogger("jobworker.server")

WINDOW_SECONDS = 60.0
MAX_ADDRESSES = 10_000
"""The failures of so many addresses are kept; for one more, the oldest are dropped."""
LOG_SECONDS = 1.0
SLOWED_PART = 4
"""A network that is slowed down gets a quarter of the places: in more, its connections would only
wait longer for their turns."""
STALL_SECONDS = 0.5
"""How long the client's next step of a handshake may take, while others wait for its place."""


@define(eq=False)
class PendingConnection:
    """A connection on its way to being open."""

    peer: str
    network: str
    """The network that its failure is counted for, see `network_of`."""
    _scope: trio.CancelScope
    _limiter: "ConnectionLimiter"
    sound: bool = False
    """Whether the client has shown a certificate of our CA: then its handshake has not failed."""
    came_at: float = field(factory=trio.current_time)
    heard: bool = False
    """Whether the client has sent its hello."""
    turn_at: float = math.inf
    """Since when the service has waited for the client; infinite while the client waits for it."""
    is_gone: Callable[[], bool] = field(kw_only=True)
    """Returns whether the peer has closed."""
    drop_reason: JobworkerError | None = field(default=None, init=False)
    """Why it was ended early; None if there is nothing to log."""
    was_dropped: bool = field(default=False, init=False)

    def start_turn(self) -> None:
        """Record that the service now waits for the client's next step."""
        self.turn_at = trio.current_time()

    def mark_authenticated(self) -> None:
        """Record that the client has shown a certificate of our CA, and waits for the service."""
        self.sound, self.turn_at = True, math.inf

    def drop(self, why: JobworkerError | None) -> None:
        """End the connection, to free its place or because the peer has closed.

        `why` is logged as a limit that was reached; None logs nothing.
        """
        self.was_dropped, self.drop_reason = True, why
        self._limiter.forget(self)
        self._scope.cancel()

    def finish(self) -> None:
        """Record that the connection is open: free its place, and lift the handshake's deadline."""
        self.sound = True
        self._scope.deadline = math.inf
        self._limiter.forget(self)


@frozen
class ConnectionStatistics:
    """How many connections arrive and are open at this moment."""

    arriving: int
    inside: int


@define(eq=False)
class _Failures:
    """The failed handshakes of one address since `since`."""

    since: float
    count: int = 0
    lottery: HandshakeLottery = field(factory=HandshakeLottery)
    """The turns of its handshakes, once it is slowed down."""


@define(eq=False)
class ConnectionLimiter:
    """The connections of one service, counted against its limits."""

    limits: ConnectionLimits = field(factory=ConnectionLimits)
    counters: Counters = field(factory=Counters)
    job_ids: Container[int] = ()
    """The user ids of this host that jobs have."""
    _arriving: dict[PendingConnection, None] = field(factory=dict, init=False)
    """Oldest first."""
    _arriving_of: Counter[str] = field(factory=Counter, init=False)
    """How many connections of each network are arriving."""
    _inside: Counter[str] = field(factory=Counter, init=False)
    _failures: dict[str, _Failures] = field(factory=dict, init=False)
    """Oldest window first."""
    _slows_until: float = field(default=-math.inf, init=False)
    _logged: dict[str, tuple[float, int]] = field(factory=dict, init=False)

    def statistics(self) -> ConnectionStatistics:
        """The number of arriving and of open connections."""
        return ConnectionStatistics(arriving=len(self._arriving), inside=self._inside.total())

    @contextmanager
    def track_pending(
        self, peer: str, network: str, is_gone: Callable[[], bool] = lambda: False
    ) -> Iterator[PendingConnection]:
        """Count a connection as arriving in the block, and cancel the block if it takes too long.

        The bound is `limits.handshake_timeout`, until `PendingConnection.finish`. A failure is
        counted for `network` (`network_of`). `is_gone` returns whether the peer has closed. Raises
        TooManyFailures if the network is slowed down and there is no place for one more of it.
        """
        if not self._has_place(network):
            self._make_room(network)
        seconds = parse_duration(self.limits.handshake_timeout)
        scope = trio.move_on_after(seconds)
        pending = PendingConnection(peer, network, scope, self, is_gone=is_gone)
        self._arriving[pending] = None
        self._arriving_of[network] += 1
        try:
            with scope:
                yield pending
        finally:
            self.forget(pending)
            if pending.heard and not pending.sound:
                self._count_failure(network)
        if pending.drop_reason is not None:
            self.record_limit(peer, pending.drop_reason)
        elif scope.cancelled_caught and not pending.was_dropped:
            self.record_limit(
                peer, HandshakeTooSlow(f"cannot wait for the handshake: {seconds:g} s are over")
            )

    async def wait_turn(self, pending: PendingConnection) -> None:
        """Wait until a handshake may begin: only addresses that are slowed down have to wait."""
        pending.heard = True
        failures = self._slowed(pending.network)
        if failures is None:
            await trio.lowlevel.checkpoint()
        else:
            await failures.lottery.wait_turn(pending)

    def refusal(self, network: str) -> TooManyFailures | None:
        """The error if a network is slowed down and there is no place for one more of it."""
        return self._too_many(network) if self._is_full(network) else None

    def _is_full(self, network: str) -> bool:
        if self._slowed(network) is None or self._has_place(network):
            return False
        return self._stalled(self._candidates(network), network) is None

    def _too_many(self, network: str) -> TooManyFailures:
        return TooManyFailures(
            f"cannot serve {network}: {self.limits.max_failed_handshakes} handshakes from there "
            "failed within a minute, and too many wait for their turn",
            remedy="try again later",
        )

    def slows_anybody(self) -> bool:
        """Whether there may be a network that is slowed down."""
        return trio.current_time() < self._slows_until

    def _has_place(self, network: str) -> bool:
        """Whether there is a place for one more of a network without ending another connection."""
        return not self._has_its_part(network) and len(self._arriving) < self.limits.max_handshakes

    def _has_its_part(self, network: str) -> bool:
        """Whether a network is slowed down and has all its places (one in `SLOWED_PART`)."""
        part = self.limits.max_handshakes / SLOWED_PART
        return self._slowed(network) is not None and self._arriving_of[network] >= part

    def _make_room(self, network: str) -> None:
        """End one arriving connection for a newcomer.

        Raises TooManyFailures if none has to leave for a newcomer of this network.
        """
        if self._is_full(network):
            raise self._too_many(network)
        crowd = self._candidates(network)
        slowed = [each for each in self._arriving if self._slowed(each.network) is not None]
        given_up = self._stalled(crowd, network) or _oldest(slowed) or _oldest(crowd)
        assert given_up is not None
        given_up.drop(
            TooManyHandshakes("cannot wait for the handshake: a newer connection needs its place")
        )

    def _candidates(self, network: str) -> list[PendingConnection]:
        """The connections that may have to leave for a newcomer of a network, oldest first.

        These are the connections of the networks with most of them. If the newcomer's network is
        slowed down and has all its places, they are its own connections.
        """
        if self._has_its_part(network):
            return [each for each in self._arriving if each.network == network]
        most = max(self._arriving_of.values())
        return [each for each in self._arriving if self._arriving_of[each.network] == most]

    def _stalled(self, crowd: list[PendingConnection], network: str) -> PendingConnection | None:
        """The oldest of `crowd` that stalls, and so has to leave for a newcomer; else None."""
        # A client with a certificate takes its next step within milliseconds.
        late = trio.current_time() - STALL_SECONDS
        # A connection that has just come does not leave for a network that is slowed down.
        silent = late if self._slowed(network) is not None else math.inf
        for each in crowd:
            if each.turn_at < late or (not each.heard and each.came_at < silent):
                return each
        return None

    def forget(self, pending: PendingConnection) -> None:
        """Count a connection as arriving no longer, since it is open or has ended."""
        if pending in self._arriving:
            del self._arriving[pending]
            self._arriving_of[pending.network] -= 1
            if not self._arriving_of[pending.network]:
                del self._arriving_of[pending.network]

    @contextmanager
    def track_open(self, name: str) -> Iterator[None]:
        """Count an open connection of a name while the block lasts.

        All certificates of a name count together. Raises TooManyConnections.
        """
        limits, mine, taken = self.limits, self._inside[name], self._inside.total()
        if mine >= limits.max_connections_per_certificate:
            raise TooManyConnections(
                f"cannot serve the connection: {mine} are open with certificates of this name",
                remedy="close some of them, or make more calls on each",
            )
        if not may_take_one_more(limits.max_connections, taken=taken, mine=mine):
            full = taken >= limits.max_connections
            why = "as many as this service takes" if full else "and the rest is for names with few"
            raise TooManyConnections(
                f"cannot serve the connection: {taken} of {limits.max_connections} are open, {why}",
                remedy="try again later",
            )
        self._inside[name] += 1
        self.counters.add(CONNECTIONS)
        try:
            yield
        finally:
            self._inside[name] -= 1
            if not self._inside[name]:
                del self._inside[name]

    def record_limit(self, peer: str, error: JobworkerError) -> None:
        """Count that a limit was reached, and log it at most once a second for each error."""
        self.counters.add(LIMITS_REACHED, error.name)
        now = trio.current_time()
        last, passed_over = self._logged.get(error.name, (-LOG_SECONDS, 0))
        if now - last < LOG_SECONDS:
            self._logged[error.name] = (last, passed_over + 1)
            return
        more = f" (and {passed_over} more before)" if passed_over else ""
        log.info("%s: %s: %s%s", peer, error.name, error.message, more)
        self._logged[error.name] = (now, 0)

    def _slowed(self, network: str) -> _Failures | None:
        """The failures of a network if it is slowed down for them; else None."""
        limit = self.limits.max_failed_handshakes
        failures = self._failures_of(network)
        return failures if limit and failures is not None and failures.count >= limit else None

    def _count_failure(self, network: str) -> None:
        self.counters.add(HANDSHAKES_FAILED)
        failures = self._failures_of(network)
        if failures is None:
            if len(self._failures) >= MAX_ADDRESSES:
                del self._failures[next(iter(self._failures))]
            failures = self._failures[network] = _Failures(trio.current_time())
        failures.count += 1
        if failures.count == self.limits.max_failed_handshakes:
            self._slows_until = max(self._slows_until, failures.since + WINDOW_SECONDS)

    def _failures_of(self, network: str) -> _Failures | None:
        """The failures of a network within its current window of `WINDOW_SECONDS`, if any."""
        failures = self._failures.get(network)
        if failures is not None and trio.current_time() - failures.since >= WINDOW_SECONDS:
            del self._failures[network]
            return None
        return failures


def _oldest(crowd: list[PendingConnection]) -> PendingConnection | None:
    """The oldest connection that has shown no certificate; the oldest of all if each has."""
    return next((each for each in crowd if not each.sound), crowd[0] if crowd else None)


def network_of(address: str, user: str | None = None) -> str:
    """The network that failures of an address are counted for.

    That is an IPv4 address itself, or the /64 from which an IPv6 host chooses its addresses. All of
    127.0.0.0/8 is one network, since a program may have any address in it. Each `user` of the
    service's own host is a network of its own, whichever address it has.
    """
    if user is not None:
        return f"this host ({user})"
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is None:
            return str(ipaddress.IPv6Network((parsed, 64), strict=False))
        parsed = parsed.ipv4_mapped
    return "127.0.0.0/8" if parsed.is_loopback else str(parsed)


def line_of(network: str) -> str:
    """The name under which connections of a network take turns until they show a certificate.

    No certificate has such a name, since it begins with a space (`pki.identity.name_fault`).
    """
    return f" {network}"
