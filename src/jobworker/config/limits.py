"""The section `[limits]` of the configuration: how much of the service itself clients may use.

A client that reaches a limit gets the limit's error (`errors`), and the service counts it under the
error's name.
"""

from attrs import field, frozen

from jobworker.config.durations import check_duration, check_positive_duration
from jobworker.model.bounds import within

MIN_MESSAGE_BYTES = 65_536
MAX_MESSAGE_BYTES = 64 << 20


@frozen(kw_only=True)
class ConnectionLimits:
    """How much of the service clients may use."""

    max_connections: int = field(default=1000, validator=within(1, 1_000_000))
    """Open connections in all; the last tenth is for names with few connections."""
    max_connections_per_certificate: int = field(default=200, validator=within(1, 1_000_000))
    """Open connections of one name, with all its certificates together."""
    max_handshakes: int = field(default=256, validator=within(1, 1_000_000))
    """Connections during their handshake; one more closes another: of the addresses with the most,
    the oldest that stalls, or else the oldest without a certificate."""
    handshake_timeout: str = field(default="10s", validator=check_positive_duration)
    """Time for TLS handshake, HTTP request and upgrade together."""
    max_failed_handshakes: int = field(default=300, validator=within(1, 1_000_000, or_zero=True))
    """Failed handshakes a minute from one address (an IPv6 /64), or from one user of this host, all
    jobs being one user. After these, its handshakes take turns. 0 is no limit."""
    max_message_bytes: int = field(
        default=4 << 20, validator=within(MIN_MESSAGE_BYTES, MAX_MESSAGE_BYTES)
    )
    """Size of one message from a client."""
    max_requests_in_flight: int = field(default=128, validator=within(1, 65_536))
    """Unanswered requests of one connection."""
    max_follows: int = field(default=256, validator=within(1, 65_536))
    """Subscriptions of one connection."""
    max_waits: int = field(default=2000, validator=within(1, 1_000_000))
    """Subscriptions and requests that wait for a job's end, of one name on all its connections."""
    ping_interval: str = field(default="30s", validator=check_duration)
    """Time between two pings to a client; "0" sends none."""
    ping_timeout: str = field(default="1m", validator=check_positive_duration)
    """Time for a client to answer a ping."""
