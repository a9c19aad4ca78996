"""Warnings about a server's files: what expires soon, and lists that cannot be verified yet."""

from datetime import datetime, timedelta

from attrs import frozen
from cryptography import x509

from jobworker.pki.authority import is_made_here
from jobworker.pki.credentials import RENEWAL, SERVER_REMEDY, PemFile, read_certificates
from jobworker.pki.revocation import list_warnings, read_all
from jobworker.pki.server_files import ServerFiles

WARN_BEFORE = timedelta(days=30)
WARN_FRACTION = 3
"""A file that is valid for less than 90 days is warned about in the last third of its validity."""

_CERTIFICATE, _CA, _LIST = "server certificate", "CA certificate", "revocation list"
_RENEW = {
    (_CERTIFICATE, True): "renew it with 'worker certs renew server' and reload the service",
    (_CA, True): "make a new CA in good time: every certificate ends with it",
    (_LIST, True): "make a new one with 'worker certs crl' and reload the service",
    (_CERTIFICATE, False): "get a new one from its CA and reload the service",
    (_CA, False): "get the CA's next one in good time: every certificate ends with it",
    (_LIST, False): "get that CA's next one, put it into the file and reload the service",
}
"""The remedy by kind of file, and by whether `worker certs` made the authority."""


@frozen(kw_only=True)
class _Validity:
    """The validity of a certificate or a list."""

    what: str
    path: str
    name: x509.Name
    """The subject of a certificate, or the issuer of a list."""
    issuer: x509.Name
    start: datetime
    end: datetime


def expiry_warnings(files: ServerFiles, now: datetime) -> tuple[str, ...]:
    """Return a line for each certificate or list that expires soon or has expired.

    Also the warnings of `list_warnings`. Raises `CredentialsUnusable` for an unreadable file, since
    files change after a start.
    """
    ends = [
        *_certificates(_CERTIFICATE, files.certificate, RENEWAL),
        *_certificates(_CA, files.ca, SERVER_REMEDY),
        *_lists(files.crl),
    ]
    warnings = []
    for term in ends:
        left = term.end - now
        if left <= min(WARN_BEFORE, (term.end - term.start) / WARN_FRACTION):
            when = f"ends in {left.days} days, at" if left > timedelta() else "ended at"
            moment = term.end.isoformat().replace("+00:00", "Z")
            whose = term.name.rfc4514_string()
            remedy = _RENEW[term.what, is_made_here(term.issuer)]
            warnings.append(f"the {term.what} of {whose} in {term.path} {when} {moment}; {remedy}")
    return (*warnings, *list_warnings(files, now))


def _certificates(what: str, file: PemFile, remedy: str) -> list[_Validity]:
    return [
        _Validity(
            what=what,
            path=str(file.path),
            name=each.subject,
            issuer=each.issuer,
            start=each.not_valid_before_utc,
            end=each.not_valid_after_utc,
        )
        for each in read_certificates(file, what, remedy)
    ]


def _lists(file: PemFile | None) -> list[_Validity]:
    if file is None:
        return []
    return [
        _Validity(
            what=_LIST,
            path=str(file.path),
            name=each.issuer,
            issuer=each.issuer,
            start=each.last_update_utc,
            end=each.next_update_utc,
        )
        for each in read_all(file)
        if each.next_update_utc is not None
    ]
