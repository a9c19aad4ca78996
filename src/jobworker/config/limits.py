"""The limits of the configuration: `[limits]`, what clients may ask of the service itself.

Each has an error by which it is told (`errors`), and reaching it is counted under the error's name.
"""

from attrs import field, frozen

from jobworker.config.durations import check_duration, check_positive_duration
from jobworker.model.bounds import within

MIN_MESSAGE_BYTES = 65_536
MAX_MESSAGE_BYTES = 64 << 20


@frozen(kw_only=True)
class ConnectionLimits:
    """How much of the service clients may take up."""

    max_connections: int = field(default=1000, validator=within(1, 1_000_000))
    """Open connections in all; the last tenth is for names that have few."""
    max_connections_per_certificate: int = field(default=200, validator=within(1, 1_000_000))
    """Open connections of one name, with whichever of its certificates."""
    max_handshakes: int = field(default=256, validator=within(1, 1_000_000))
    """Connections that are not open yet; at one more, the oldest of them is let go."""
    handshake_timeout: str = field(default="10s", validator=check_positive_duration)
    """For TLS, HTTP request and upgrade together."""
    max_failed_handshakes: int = field(default=300, validator=within(1, 1_000_000, or_zero=True))
    """A minute from one address (an IPv6 /64), of this host from one user, jobs being one; then its
    handshakes take turns. 0 is no limit."""
    max_message_bytes: int = field(
        default=4 << 20, validator=within(MIN_MESSAGE_BYTES, MAX_MESSAGE_BYTES)
    )
    """Of one message from a client."""
    max_requests_in_flight: int = field(default=128, validator=within(1, 65_536))
    """Requests of one connection that are not answered yet."""
    max_follows: int = field(default=256, validator=within(1, 65_536))
    """Subscriptions of one connection."""
    max_waits: int = field(default=2000, validator=within(1, 1_000_000))
    """Of one name, on all of its connections: subscriptions, and requests that wait for an end."""
    ping_interval: str = field(default="30s", validator=check_duration)
    """Between pings to a client; "0" sends none."""
    ping_timeout: str = field(default="1m", validator=check_positive_duration)
    """For the answer to a ping."""
