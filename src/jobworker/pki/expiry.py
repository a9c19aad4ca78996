"""Warnings about a server's files: what comes to its end, and lists that cannot be checked yet."""

from datetime import datetime, timedelta

from cryptography import x509

from jobworker.pki.credentials import PemFile
from jobworker.pki.material import ServerFiles
from jobworker.pki.revocation import read_all, unproven_lists

WARN_BEFORE = timedelta(days=30)

_RENEW = {
    "server certificate": "renew it with 'worker certs renew' and reload the service",
    "CA certificate": "make a new CA in good time: every certificate ends with it",
    "revocation list": "make a new one with 'worker certs crl' and reload the service",
}


def expiry_warnings(
    files: ServerFiles, now: datetime, before: timedelta = WARN_BEFORE
) -> tuple[str, ...]:
    """One line for each certificate or list that ends within `before` of `now`, or has ended.

    And one for each unproven list. The files were judged before.
    """
    ends = [
        *_certificates("server certificate", files.certificate),
        *_certificates("CA certificate", files.ca),
        *_lists(files.crl),
    ]
    warnings = []
    for what, path, end in ends:
        left = end - now
        if left <= before:
            when = f"ends in {left.days} days, at" if left > timedelta() else "ended at"
            moment = end.isoformat().replace("+00:00", "Z")
            warnings.append(f"the {what} {path} {when} {moment}; {_RENEW[what]}")
    return (*warnings, *unproven_lists(files, now))


def _certificates(what: str, file: PemFile) -> list[tuple[str, str, datetime]]:
    found = x509.load_pem_x509_certificates(file.content)
    return [(what, str(file.path), each.not_valid_after_utc) for each in found]


def _lists(file: PemFile | None) -> list[tuple[str, str, datetime]]:
    if file is None:
        return []
    ends = [each.next_update_utc for each in read_all(file)]
    return [("revocation list", str(file.path), end) for end in ends if end is not None]
