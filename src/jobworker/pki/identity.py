"""Read the name and role of a connection's peer from its certificate.

The configuration's table of subjects comes first (`model.subjects`): it may find a role by any CN,
OU, host name, URI or e-mail address in the certificate. If no entry of the table matches, the
certificate's only OU is the role. The name is the certificate's only CN. If the table matches a
certificate with no CN, or with several, the name is the value that matched.

A certificate with a missing, a second or an empty CN or OU, or with white space around one, is
refused, never corrected. The caller checks that the role exists, and the TLS context has verified
the certificate.
"""

import ssl
from collections.abc import Mapping
from datetime import UTC, datetime

from attrs import frozen

from jobworker import errors
from jobworker.model.subjects import Match, Subjects


@frozen(kw_only=True)
class Identity:
    """The identity of a peer, from its verified certificate.

    `role` comes from the table of subjects, or is the subject's only OU, unchanged. `serial` is
    upper-case hexadecimal, as `openssl x509 -serial` prints it.
    """

    common_name: str
    role: str
    serial: str
    not_after: datetime


def identity(
    peer_certificate: Mapping[str, object] | None,
    subjects: Subjects = Subjects(),  # noqa: B008 - frozen
) -> Identity:
    """Read name and role from the result of `ssl.SSLSocket.getpeercert()`.

    The role comes from the table `subjects`, or else from exactly one OU. The name is exactly one
    CN. Both may stand anywhere in the subject, and are taken unchanged: nothing is stripped, folded
    or chosen among several. The caller checks that the role exists. Raises `PermissionDenied`.
    """
    if not peer_certificate:
        raise errors.PermissionDenied(
            "cannot identify you: no verified certificate was presented",
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
    """The values in a certificate that the table of subjects may name, by kind."""
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
    except ValueError:  # OpenSSL prints "Bad time value" for a time that it cannot parse
        raise errors.PermissionDenied(
            "cannot read the end of your certificate: its time is malformed",
            remedy="use a client certificate that the administrator issued",
        ) from None
    return datetime.fromtimestamp(seconds, UTC)


def name_fault(value: str) -> str | None:
    """Return why a certificate's CN or OU cannot serve as a name or role; None if it can.

    Names are printed in logs and tables, and compared. So two names must not differ in characters
    that a reader cannot see. The bound of 64 characters is RFC 5280's ub-common-name.
    """
    if not value:
        return "is empty"
    if value != value.strip():
        return "has white space around it"
    if not value.isprintable():
        return "contains unprintable characters"
    return "is longer than 64 characters" if len(value) > 64 else None


def _values(peer_certificate: Mapping[str, object], attribute: str) -> list[str]:
    subject = peer_certificate.get("subject", ())
    assert isinstance(subject, tuple)
    # A relative distinguished name may contain several attributes, and several of them may have
    # the same attribute. To read only the first of each would allow a certificate with two roles.
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
