"""Who the peer of a connection is, by its certificate.

Exactly one CN, the name, and exactly one OU, the role: none, two, empty ones or white space
around them are refused, never mended. Whether the role exists is the caller's to know, and that
the certificate was verified is the TLS context's to see to.
"""

import ssl
from collections.abc import Mapping
from datetime import UTC, datetime

from attrs import frozen

from jobworker import errors


@frozen(kw_only=True)
class Identity:
    """Who a peer is, by its verified certificate.

    `role` is the subject's only OU, as it stands there. `serial` is upper-case hexadecimal, as
    `openssl x509 -serial` prints it.
    """

    common_name: str
    role: str
    serial: str
    not_after: datetime


def identity(peer_certificate: Mapping[str, object] | None) -> Identity:
    """Read name and role from what `ssl.SSLSocket.getpeercert()` returned.

    Exactly one OU and one CN, wherever in the subject they stand, taken as they are: nothing is
    stripped, folded or chosen among several. Whether the role exists is the caller's to know.
    Raises `PermissionDenied`.
    """
    if not peer_certificate:
        raise errors.PermissionDenied(
            "cannot tell who you are: no verified certificate was presented",
            remedy="use a client certificate that the administrator issued",
        )
    return Identity(
        role=_only(peer_certificate, "organizationalUnitName", "OU"),
        common_name=_only(peer_certificate, "commonName", "CN"),
        serial=str(peer_certificate["serialNumber"]),
        not_after=_end(peer_certificate),
    )


def _end(peer_certificate: Mapping[str, object]) -> datetime:
    try:
        seconds = ssl.cert_time_to_seconds(str(peer_certificate["notAfter"]))
    except ValueError:  # OpenSSL writes "Bad time value" for what it cannot read
        raise errors.PermissionDenied(
            "cannot tell when your certificate ends: its time is malformed",
            remedy="use a client certificate that the administrator issued",
        ) from None
    return datetime.fromtimestamp(seconds, UTC)


def name_fault(value: str) -> str | None:
    """Say why a certificate's CN or OU cannot serve as a name or role; None if it can.

    Names go into logs, tables and comparisons: what cannot be seen there must not decide. The
    bound is RFC 5280's ub-common-name.
    """
    if not value:
        return "is empty"
    if value != value.strip():
        return "has white space around it"
    if not value.isprintable():
        return "holds unprintable characters"
    return "is longer than 64 characters" if len(value) > 64 else None


def _only(peer_certificate: Mapping[str, object], attribute: str, short: str) -> str:
    subject = peer_certificate.get("subject", ())
    assert isinstance(subject, tuple)
    # A relative name may hold several attributes, and an attribute may come again in another:
    # looking at each one's first would let a certificate bear two roles.
    values = [str(value) for relative in subject for name, value in relative if name == attribute]
    if len(values) != 1:
        fault = f"its subject has {len(values) or 'no'} {short}, exactly one is needed"
    elif found := name_fault(values[0]):
        fault = f"its subject's {short} {found}"
    else:
        return values[0]
    raise errors.PermissionDenied(
        f"cannot take a role from your certificate: {fault}",
        remedy="ask the administrator for a certificate with one CN, your name, "
        "and one OU, your role",
    )
