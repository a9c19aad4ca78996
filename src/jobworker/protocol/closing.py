"""The codes of closing frames (RFC 6455, section 7.4), and the client's reaction to each.

The service has one code for each possible reaction of a client. The reason in the frame begins with
the name of an error (`errors`): `ping_unanswered: …`. The only exception is TOO_BIG, with which
trio-websocket closes: its reason states the bound. For a code that is not in this table, such as
one of a proxy, the client reacts as to a broken connection.
"""

from enum import Enum


class Verdict(Enum):
    """The client's reaction: what it does with the calls and subscriptions of the connection."""

    AGAIN = "again"
    """Reconnect, retry calls, and resume output at its offset."""
    RENEW = "renew"
    """Reconnect once: only another certificate, or a change on the server, can help."""
    TOO_LARGE = "too large"
    """Fail the largest request without a reply; do the same as for AGAIN with all others."""
    FATAL = "fatal"
    """Fail all calls: a retry would have the same end."""


GOING_AWAY = 1001
NO_CODE = 1005
NO_FRAME = 1006
"""Never sent: the client's code for a connection that ended without a closing frame."""
REFUSED = 1008
TOO_BIG = 1009
TRY_AGAIN = 1013

ENDED = frozenset({GOING_AWAY, 1012, 1014})
"""Codes of a service that ends, whatever the calls were; the next service will answer them."""

VERDICTS = {
    1000: Verdict.AGAIN,
    GOING_AWAY: Verdict.AGAIN,  # the service ends; the next one goes on
    1002: Verdict.FATAL,  # the client violated the protocol
    1003: Verdict.FATAL,
    NO_CODE: Verdict.AGAIN,
    NO_FRAME: Verdict.AGAIN,
    1007: Verdict.FATAL,
    REFUSED: Verdict.RENEW,  # certificate or role are no longer valid
    TOO_BIG: Verdict.TOO_LARGE,
    1010: Verdict.FATAL,
    1011: Verdict.FATAL,  # an unexpected fault in the service
    1012: Verdict.AGAIN,  # a restart, reported by a proxy
    TRY_AGAIN: Verdict.AGAIN,  # a limit: an unanswered ping, too many pongs
    1014: Verdict.AGAIN,  # a proxy found no service
}


def verdict(code: int) -> Verdict:
    """Return the client's reaction to the code of a closing frame."""
    return VERDICTS.get(code, Verdict.AGAIN)
