"""Admission: how many may come in at a time, and whose handshakes take turns.

    accepted ─► arriving (half-open: TLS, HTTP request, upgrade) ─► inside (an open connection)

Those who arrive are bounded apart from those who are inside, so that strangers who stall cannot
take up the places of clients. At one too many, of those networks that have most of the places the
oldest is let go that stalls (it has not said a byte, or does not go on), or else the oldest without
a certificate: an honest client arrives within milliseconds (sshd's MaxStartups has the same aim and
drops the newcomer by lot).

An address from which handshakes keep failing is slowed down: its handshakes begin one after the
other, by lot (`turns`), so that it has no more than a part of the processor for signatures. It
is not shut out, since a program behind the same address could then keep an administrator away:
every newcomer has the same chance that there is a place, and who has none is told at once by a
closed connection, which costs next to nothing (`refusal`), and tries again. On the service's own
host each user is slowed down alone (`local_user`), and jobs as if they were one: none
of them stands in the way of an account. Who closes without having said its hello, as health checks
do, has not failed.

Every refusal has an error of its own name; it is counted, and logged at most once a second, since a
flood must not become a flood of log lines.
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
from jobworker.model.fair_room import has_room
from jobworker.model.units import parse_duration
from jobworker.server.counters import CONNECTIONS, HANDSHAKES_FAILED, LIMITS_REACHED, Counters
from jobworker.server.turns import Turns

log = logging.getLogger("jobworker.server")

WINDOW_SECONDS = 60.0
MAX_ADDRESSES = 10_000
"""Whose failures are remembered at a time; at one more, the oldest are forgotten."""
LOG_SECONDS = 1.0
SLOWED_PART = 4
"""Of the places a network that is slowed down has a quarter: more would only wait longer."""
STALL_SECONDS = 0.5
"""How long a handshake may take, once it could begin, where others wait for the place."""


@define(eq=False)
class Arrival:
    """A connection on its way to being open."""

    peer: str
    network: str
    """What its failure is counted by, see `network_of`."""
    _scope: trio.CancelScope
    _admission: "Admission"
    sound: bool = False
    """Whether the client has shown a certificate of ours: then it is no failed handshake."""
    came_at: float = field(factory=trio.current_time)
    heard: bool = False
    """Whether it has said its hello."""
    turn_at: float = math.inf
    """Since when it has been the client's turn; infinite while it waits for the service."""
    is_gone: Callable[[], bool] = field(kw_only=True)
    """Whether the peer has closed."""
    let_go_for: JobworkerError | None = field(default=None, init=False)
    """Why it was let go before its time, where there is something to tell."""
    was_let_go: bool = field(default=False, init=False)

    def has_turn(self) -> None:
        """It is for the client now to go on."""
        self.turn_at = trio.current_time()

    def has_shown_certificate(self) -> None:
        """It is sound, and waits for the service."""
        self.sound, self.turn_at = True, math.inf

    def let_go(self, why: JobworkerError | None) -> None:
        """End it, for someone else's sake, or because the peer has gone."""
        self.was_let_go, self.let_go_for = True, why
        self._admission.forget(self)
        self._scope.cancel()

    def finish(self) -> None:
        """The connection is open: it takes no place among those that arrive, and all its time."""
        self.sound = True
        self._scope.deadline = math.inf
        self._admission.forget(self)


@frozen
class Statistics:
    """How many there are at this moment."""

    arriving: int
    inside: int


@define(eq=False)
class _Failures:
    """Of one address, since a moment."""

    since: float
    count: int = 0
    turns: Turns = field(factory=Turns)
    """Of its handshakes, once it is slowed down."""


@define(eq=False)
class Admission:
    """Of one service."""

    limits: ConnectionLimits = field(factory=ConnectionLimits)
    counters: Counters = field(factory=Counters)
    job_ids: Container[int] = ()
    """Of users of this host: those that jobs have."""
    _arriving: dict[Arrival, None] = field(factory=dict, init=False)
    """Oldest first."""
    _arriving_of: Counter[str] = field(factory=Counter, init=False)
    """How many of each network."""
    _inside: Counter[str] = field(factory=Counter, init=False)
    _failures: dict[str, _Failures] = field(factory=dict, init=False)
    """Oldest window first."""
    _slows_until: float = field(default=-math.inf, init=False)
    _logged: dict[str, tuple[float, int]] = field(factory=dict, init=False)

    def statistics(self) -> Statistics:
        """How many are here."""
        return Statistics(arriving=len(self._arriving), inside=self._inside.total())

    @contextmanager
    def arrive(
        self, peer: str, network: str, is_gone: Callable[[], bool] = lambda: False
    ) -> Iterator[Arrival]:
        """Serve a connection in the block, and end it where it is not open in time.

        `network` is what its failure is counted by (`network_of`). `is_gone` tells whether the peer
        has closed. Raises TooManyFailures where there is no place for one more of a network that is
        slowed down.
        """
        if not self._has_place(network):
            self._make_room(network)
        seconds = parse_duration(self.limits.handshake_timeout)
        scope = trio.move_on_after(seconds)
        arrival = Arrival(peer, network, scope, self, is_gone=is_gone)
        self._arriving[arrival] = None
        self._arriving_of[network] += 1
        try:
            with scope:
                yield arrival
        finally:
            self.forget(arrival)
            if arrival.heard and not arrival.sound:
                self._count_failure(network)
        if arrival.let_go_for is not None:
            self.tell(peer, arrival.let_go_for)
        elif scope.cancelled_caught and not arrival.was_let_go:
            self.tell(peer, HandshakeTooSlow(f"cannot wait for it: {seconds:g} s are over"))

    async def take_turn(self, arrival: Arrival) -> None:
        """Wait until a handshake may begin: at once, but for addresses that are slowed down."""
        arrival.heard = True
        failures = self._slowed(arrival.network)
        if failures is None:
            await trio.lowlevel.checkpoint()
        else:
            await failures.turns.take(arrival)

    def refusal(self, network: str) -> TooManyFailures | None:
        """Why there is no place for one more of a network, if there is none."""
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
        """Whether one more of a network has a place without that another leaves."""
        return not self._has_its_part(network) and len(self._arriving) < self.limits.max_handshakes

    def _has_its_part(self, network: str) -> bool:
        """Whether a network is slowed down and has all places that such may have."""
        part = self.limits.max_handshakes / SLOWED_PART
        return self._slowed(network) is not None and self._arriving_of[network] >= part

    def _make_room(self, network: str) -> None:
        """Let one go that has not arrived. Raises TooManyFailures where the newcomer has to."""
        if self._is_full(network):
            raise self._too_many(network)
        crowd = self._candidates(network)
        slowed = [each for each in self._arriving if self._slowed(each.network) is not None]
        given_up = self._stalled(crowd, network) or _oldest(slowed) or _oldest(crowd)
        assert given_up is not None
        given_up.let_go(TooManyHandshakes("cannot wait for it: newer ones need its place"))

    def _candidates(self, network: str) -> list[Arrival]:
        """Who may have to leave for a newcomer of a network, the oldest first.

        Those from where most arrive; of a network that has all it may have, its own.
        """
        if self._has_its_part(network):
            return [each for each in self._arriving if each.network == network]
        most = max(self._arriving_of.values())
        return [each for each in self._arriving if self._arriving_of[each.network] == most]

    def _stalled(self, crowd: list[Arrival], network: str) -> Arrival | None:
        """The oldest of a crowd that takes too long, so that it has to leave for a newcomer."""
        # A client with a certificate is in within moments of its turn.
        late = trio.current_time() - STALL_SECONDS
        # One that has just come leaves for nobody who is slowed down.
        silent = late if self._slowed(network) is not None else math.inf
        for each in crowd:
            if each.turn_at < late or (not each.heard and each.came_at < silent):
                return each
        return None

    def forget(self, arrival: Arrival) -> None:
        """Count no longer what has arrived, or never will."""
        if arrival in self._arriving:
            del self._arriving[arrival]
            self._arriving_of[arrival.network] -= 1
            if not self._arriving_of[arrival.network]:
                del self._arriving_of[arrival.network]

    @contextmanager
    def enter(self, name: str) -> Iterator[None]:
        """Count an open connection of a name, with whichever certificate, while the block lasts.

        Raises TooManyConnections.
        """
        limits, mine, taken = self.limits, self._inside[name], self._inside.total()
        if mine >= limits.max_connections_per_certificate:
            raise TooManyConnections(
                f"cannot serve the connection: {mine} are open with certificates of this name",
                remedy="close some of them, or make more calls on each",
            )
        if not has_room(limits.max_connections, taken=taken, mine=mine):
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

    def tell(self, peer: str, error: JobworkerError) -> None:
        """Count that a limit was reached, and log it, at most once a second."""
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
        """The failures of a network that is slowed down for them; None where it is not."""
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
        """Those of the minute that runs for it, if one does."""
        failures = self._failures.get(network)
        if failures is not None and trio.current_time() - failures.since >= WINDOW_SECONDS:
            del self._failures[network]
            return None
        return failures


def _oldest(crowd: list[Arrival]) -> Arrival | None:
    """Who leaves where nobody stalls: of those that have not shown a certificate, if there are."""
    return next((each for each in crowd if not each.sound), crowd[0] if crowd else None)


def network_of(address: str, user: str | None = None) -> str:
    """What failures are counted by: an IPv4 address, or the /64 that an IPv6 host chooses from.

    Of 127.0.0.0/8 a program may have any, so all are one. Of the service's own host each user
    counts alone, by whichever of its addresses.
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
    """In whose name strangers of a network take turns: all who have not shown a certificate yet.

    No certificate bears such a name, since it begins with a space (`pki.identity.name_fault`).
    """
    return f" {network}"
