"""Decide when a server that waiting calls depend on has gone silent. Pure: no clock, no socket.

A stopped process and a network that drops everything look the same: the connection stays open, and
nothing arrives. A reply may legally take days (`job.wait`), so its absence shows nothing. But every
service that runs answers a ping (RFC 6455, section 5.5.2), and sends a pong of its own while it
reads nothing for a while (`server.requests.watches`). So while something waits for the server, the
caller passes the counts of the connection's traffic to `tick` once a second, and sends a ping when
`tick` asks for one.

Silence is counted in ticks, not by a clock. While the machine sleeps, or the program does not run
its event loop, there is no tick, and the reader gets its turn before the next one.

Signs of life are a whole frame, or LEAST_BYTES of a long one. Fewer bytes without a whole frame may
be the answers to our own pings, in the place of bytes that a faulty proxy has lost. While a long
request is on its way, the ping waits behind it. So bytes before the ping that the server's machine
acknowledges are a sign too; later ones are not, since its kernel also takes them for a stopped
process.
"""

import math

from attrs import define, field, frozen

TICK_SECONDS = 1.0
PING_SECONDS = 15.0
"""The ping waits so long, because the service's own pings and replies may make it needless."""
SILENT_SECONDS = 45.0
"""A ping then has no answer for 30 s. A live service answers in milliseconds, on an overloaded host
in seconds; pauses of a machine that is moved or backed up, and of TCP after lost packets, are
shorter too. The server waits for at least as long before it gives up a client."""
LEAST_BYTES = 1024
"""More than the pings of SILENT_SECONDS and the answers to them, TLS included."""


@frozen(kw_only=True)
class Traffic:
    """What has passed over a connection so far."""

    frames: int
    """Whole frames from the server."""
    received_bytes: int
    sent_bytes: int
    """Bytes that this machine's kernel has taken."""
    taken_bytes: int
    """Bytes that the server's machine has acknowledged."""


@define(eq=False)
class Silence:
    """How long one connection has shown no sign of life."""

    _heard: Traffic
    """The traffic at the last sign of life."""
    _taken_bytes: int = field(init=False)
    """Bytes that the server's machine had acknowledged at the tick before."""
    seconds: float = field(default=0, init=False)
    """How long it has lasted."""
    _has_ping: bool = field(default=False, init=False)
    """Whether a ping is being sent, or was sent since the last frame."""
    _ping_end: float = field(default=math.inf, init=False)
    """How many bytes had been sent when the ping had; infinite before."""

    def __attrs_post_init__(self) -> None:
        self._taken_bytes = self._heard.taken_bytes

    @property
    def is_over_the_bound(self) -> bool:
        """Whether the caller shall give the connection up."""
        return self.seconds >= SILENT_SECONDS

    def tick(self, now: Traffic) -> bool:
        """Count one tick in which something waited. Returns whether to send a ping now.

        After True, the caller calls `ping_sent`.
        """
        before, self._taken_bytes = self._taken_bytes, now.taken_bytes
        read = (
            now.frames != self._heard.frames
            or now.received_bytes - self._heard.received_bytes >= LEAST_BYTES
        )
        taken = self._has_ping and before < min(now.taken_bytes, self._ping_end - LEAST_BYTES)
        if read or taken:
            self._heard, self.seconds = now, 0
            self._has_ping = self._has_ping and (taken or self._ping_end == math.inf)
            return False
        self.seconds += TICK_SECONDS
        if self._has_ping or self.seconds < PING_SECONDS:
            return False
        self._has_ping, self._ping_end = True, math.inf
        return True

    def ping_sent(self, sent_bytes: int) -> None:
        """Record that the ping was sent, as the last one of so many bytes."""
        self._ping_end = sent_bytes
