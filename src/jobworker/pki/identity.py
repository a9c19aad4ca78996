"""Who the peer of a connection is, by its certificate.

The configuration's table of subjects comes first (`model.subjects`): it may find a role by any CN,
OU, host name, URI or address that the certificate bears. Where it says nothing the certificate
needs exactly one OU, the role. The name is the certificate's one CN; a certificate that the table
found and that has no CN, or several, is called by the value that found it.

None, two, empty ones or white space around them are refused, never mended. Whether the role
exists is the caller's to know; that the certificate was verified is the TLS context's to see to.
"""

import ssl
from collections.abc import Mapping
from datetime import UTC, datetime

from attrs import frozen

from jobworker import errors
from jobworker.model.subjects import Match, Subjects


@frozen(kw_only=True)
class Identity:
    """Who a peer is, by its verified certificate.

    `role` is what the table of subjects says, or the subject's only OU as it stands there.
    `serial` is upper-case hexadecimal, as `openssl x509 -serial` prints it.
    """

    common_name: str
    role: str
    serial: str
    not_after: datetime


def identity(
    peer_certificate: Mapping[str, object] | None,
    subjects: Subjects = Subjects(),  # noqa: B008 - frozen
) -> Identity:
    """Read name and role from what `ssl.SSLSocket.getpeercert()` returned.

    By the table `subjects`, else by exactly one OU; and exactly one CN, wherever in the subject
    they stand, taken as they are: nothing is stripped, folded or chosen among several. Whether the
    role exists is the caller's to know. Raises `PermissionDenied`.
    """
    if not peer_certificate:
        raise errors.PermissionDenied(
            "cannot tell who you are: no verified certificate was presented",
            remedy="use a client certificate that the administrator issued",
        )
    match = subjects.find(borne_by(peer_certificate))
    if match is None and not subjects.roles_from_ou:
        raise errors.PermissionDenied(
            "cannot take a role from your certificate: the server's table does not name it",
            remedy="ask the administrator to add it to security.subjects",
        )
    return Identity(
        role=match.role if match else _only(peer_certificate, "organizationalUnitName", "OU"),
        common_name=_name(peer_certificate, match),
        serial=str(peer_certificate["serialNumber"]),
        not_after=_end(peer_certificate),
    )


def borne_by(peer_certificate: Mapping[str, object]) -> dict[str, list[str]]:
    """What a certificate bears, by the kinds of `model.subjects`."""
    names = {"DNS": "dns", "URI": "uri", "email": "email"}
    alternative = peer_certificate.get("subjectAltName", ())
    assert isinstance(alternative, tuple)
    borne: dict[str, list[str]] = {
        "cn": _values(peer_certificate, "commonName"),
        "ou": _values(peer_certificate, "organizationalUnitName"),
    }
    for kind, value in alternative:
        if kind in names:
            borne.setdefault(names[kind], []).append(str(value))
    return borne


def _name(peer_certificate: Mapping[str, object], match: Match | None) -> str:
    if match is None or len(_values(peer_certificate, "commonName")) == 1:
        return _only(peer_certificate, "commonName", "CN")
    if fault := name_fault(match.value):
        raise errors.PermissionDenied(
            f"cannot take a name from your certificate: it has no single CN, and {match.value!r} "
            + fault,
            remedy="ask the administrator for a certificate with one CN, your name",
        )
    return match.value


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


def _values(peer_certificate: Mapping[str, object], attribute: str) -> list[str]:
    subject = peer_certificate.get("subject", ())
    assert isinstance(subject, tuple)
    # A relative name may hold several attributes, and an attribute may come again in another:
    # looking at each one's first would let a certificate bear two roles.
    return [str(value) for relative in subject for name, value in relative if name == attribute]


def _only(peer_certificate: Mapping[str, object], attribute: str, short: str) -> str:
    values = _values(peer_certificate, attribute)
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
