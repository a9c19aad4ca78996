"""The codes of closing frames (RFC 6455, section 7.4), and what each asks of the client.

The service closes with one code for each thing that a client can do about it. The reason begins
with the name of an error (`errors`): `ping_unanswered: …`; that of TOO_BIG alone, with which
trio-websocket closes, is the bound in words of its own. A client that meets a code which stands
here neither, a proxy's say, takes it for a broken line.
"""

from enum import Enum


class Verdict(Enum):
    """What becomes of the calls and subscriptions that a closed connection leaves behind."""

    AGAIN = "again"
    """Connect again, ask again, and go on with output at its offset."""
    RENEW = "renew"
    """Connect again, once: only another certificate, or a change on the server, can help."""
    TOO_LARGE = "too large"
    """Refuse the largest request that is not answered; for everything else as AGAIN."""
    FATAL = "fatal"
    """Tell everybody who waits: the same request would have the same end."""


GOING_AWAY = 1001
NO_CODE = 1005
NO_FRAME = 1006
"""Never sent: how the client names a connection that ended without a closing frame."""
REFUSED = 1008
TOO_BIG = 1009
TRY_AGAIN = 1013

ENDED = frozenset({GOING_AWAY, 1012, 1014})
"""With these the service ends, for no fault of what it was asked; the next one answers."""

VERDICTS = {
    1000: Verdict.AGAIN,
    GOING_AWAY: Verdict.AGAIN,  # the service ends; the next one goes on
    1002: Verdict.FATAL,  # we broke the protocol
    1003: Verdict.FATAL,
    NO_CODE: Verdict.AGAIN,
    NO_FRAME: Verdict.AGAIN,
    1007: Verdict.FATAL,
    REFUSED: Verdict.RENEW,  # certificate or role are not good any more
    TOO_BIG: Verdict.TOO_LARGE,
    1010: Verdict.FATAL,
    1011: Verdict.FATAL,  # it met a fault while it served this
    1012: Verdict.AGAIN,  # a restart, as a proxy tells it
    TRY_AGAIN: Verdict.AGAIN,  # a limit: an unanswered ping, too many pongs
    1014: Verdict.AGAIN,  # a proxy found no service
}


def verdict(code: int) -> Verdict:
    """What the code of a closing frame asks of the client."""
    return VERDICTS.get(code, Verdict.AGAIN)
