"""The administrator's operations on an authority's directory: init, issue, renew, revoke.

    ca-cert.pem ca-key.pem     the authority
    ca-crl.pem                 its revocation list; the service reads it
    issued.json                the certificates that it has issued (`registry`)
    NAME-cert.pem NAME-key.pem certificates and keys of the server and the clients

A name is a tenant, so a second valid certificate of a name needs `again`: nobody gets one by
mistake. A name that differs from that of a valid certificate only in case or Unicode form is always
refused.
"""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from attrs import evolve, frozen
from cryptography.exceptions import InvalidSignature

from jobworker import errors
from jobworker.pki import registry as r
from jobworker.pki.authority import Authority, Issued
from jobworker.pki.certificate_files import read_certificate
from jobworker.pki.files import replace, write_new

ALWAYS_HOSTS = ("localhost", "127.0.0.1", "::1")

CLIENT_ROLES = ("admin", "viewer")

_UNFIT = re.compile(r"[^A-Za-z0-9._@-]")


@frozen(kw_only=True)
class NewAuthority:
    """The result of `init_authority`. `hosts` are the names in the server's certificate."""

    directory: Path
    files: tuple[Path, ...]
    hosts: tuple[str, ...]
    not_after: datetime
    ca_not_after: datetime


@frozen(kw_only=True)
class IssuedFiles:
    """An issued certificate and the paths of its files."""

    entry: r.CertificateEntry
    issued: Issued
    files: tuple[Path, ...]


def init_authority(
    directory: Path,
    hosts: Sequence[str],
    *,
    now: datetime,
    days: int = 365,
    ca_days: int = 3650,
    passphrase: bytes | None = None,
) -> NewAuthority:
    """Make a CA, a server's and two clients' certificates, and write all ten files.

    The server's certificate is for localhost, 127.0.0.1, ::1 and `hosts`. A `passphrase` encrypts
    the CA's key. Raises `InvalidParams` for an invalid host or number of days, and
    `CredentialsUnusable` if a file exists already or cannot be written; then no file of this call
    is left.
    """
    authority = Authority.create(now=now, days=ca_days)
    server = authority.issue_server([*ALWAYS_HOSTS, *hosts], now=now, days=days)
    registry = r.Registry().with_entry(r.entry_of(server.certificate, "server", "server"))
    files = authority.root.files("ca", passphrase) | server.files("server")
    for role in CLIENT_ROLES:
        name = f"{role}-client"
        client = authority.issue_client(name, role, now=now, days=days)
        registry = registry.with_entry(r.entry_of(client.certificate, "client", name))
        files |= client.files(name)
    files |= r.files_of(registry, authority, None, now=now)
    write_new(directory, files)
    return NewAuthority(
        directory=directory,
        files=tuple(directory / name for name in files),
        hosts=registry.certificates[0].hosts,
        not_after=server.certificate.not_valid_after_utc,
        ca_not_after=authority.root.certificate.not_valid_after_utc,
    )


def issue_client(
    directory: Path,
    authority: Authority,
    *,
    name: str,
    role: str,
    now: datetime,
    days: int = 365,
    out: Path | None = None,
    again: bool = False,
) -> IssuedFiles:
    """Issue a client's certificate, and write its two files to `out` (else `directory`).

    Raises `InvalidParams`, also if the name has a valid certificate, and `CredentialsUnusable`.
    """
    with r.locked(directory):
        registry = r.read_registry(directory)
        _check_name(registry, name, now, again=again)
        issued = authority.issue_client(name, role, now=now, days=days)
        entry = r.entry_of(issued.certificate, "client", _stem(name))
        return _store(directory, registry, entry, issued, out, fresh=True)


def issue_server(
    directory: Path,
    authority: Authority,
    hosts: Sequence[str],
    *,
    now: datetime,
    days: int = 365,
    out: Path | None = None,
) -> IssuedFiles:
    """Issue a server's certificate for `hosts`. Raises as `issue_client` does."""
    with r.locked(directory):
        issued = authority.issue_server(hosts, now=now, days=days)
        entry = r.entry_of(issued.certificate, "server", "server")
        return _store(directory, r.read_registry(directory), entry, issued, out, fresh=True)


def renew(
    directory: Path,
    authority: Authority,
    wanted: str,
    *,
    now: datetime,
    days: int = 365,
    hosts: Sequence[str] = (),
    out: Path | None = None,
) -> IssuedFiles:
    """Issue a successor, with a new key, to the certificate of a name or serial.

    Its files replace the old ones. The old certificate stays valid until it expires or is revoked.
    A server's successor is for the hosts of the old one and for `hosts`. Raises `NotFound`,
    `InvalidParams` if the old one was revoked or if `hosts` are given for a client, and
    `CredentialsUnusable`.
    """
    with r.locked(directory):
        registry = r.read_registry(directory)
        old = registry.find(wanted)
        if old.revoked_at is not None:
            raise errors.InvalidParams(
                f"cannot renew the certificate {old.serial} of {old.name!r}: it was revoked",
                remedy="issue a new one, if that is what you want: worker certs issue",
            )
        if hosts and old.kind != "server":
            raise errors.InvalidParams(
                f"cannot renew the certificate of {old.name!r} with --host: it is not a server's",
                remedy="renew it without --host",
            )
        if old.kind == "server":
            issued = authority.issue_server([*old.hosts, *hosts], now=now, days=days)
        else:
            issued = authority.issue_client(old.name, old.role, now=now, days=days)
        entry = r.entry_of(issued.certificate, old.kind, old.stem)
        return _store(directory, registry, entry, issued, out, fresh=False)


def revoke(
    directory: Path, authority: Authority, wanted: str | Path, *, now: datetime, reason: str = ""
) -> tuple[r.CertificateEntry, ...]:
    """Revoke a certificate by serial or file, or all of a name; rewrite the revocation list.

    Certificates that were revoked before stay unchanged. Returns the newly revoked ones. Raises
    `NotFound`, `CredentialsUnusable`, and `InvalidParams` for the file of a certificate that this
    authority has not signed.
    """
    with r.locked(directory):
        registry = r.read_registry(directory)
        if isinstance(wanted, Path):
            entry = _signed_here(authority, wanted)
            wanted = entry.serial
            if all(each.serial != wanted for each in registry.certificates):  # the index was lost
                registry = registry.with_entry(entry)
        found = registry.find(wanted, or_file=True)
        same = [each for each in registry.certificates if each.name == found.name]
        revoked = []
        for entry in same if found.name == wanted else [found]:
            if entry.revoked_at is None:
                revoked.append(evolve(entry, revoked_at=now, reason=reason or None))
                registry = registry.with_entry(revoked[-1])
        replace(directory, r.files_of(registry, authority, directory / r.LIST, now=now))
        return tuple(revoked)


def _signed_here(authority: Authority, path: Path) -> r.CertificateEntry:
    certificate, entry = read_certificate(path)
    root = authority.root.certificate
    fault = "it is the CA's own" if certificate == root else None
    try:
        certificate.verify_directly_issued_by(root)
    except (ValueError, TypeError, InvalidSignature):
        fault = "this CA has not signed it"
    if fault:
        raise errors.InvalidParams(
            f"cannot revoke the certificate {path}: {fault}",
            remedy="name a certificate's file and the directory of the CA that issued it (--dir)",
        )
    return entry


def write_list(directory: Path, authority: Authority, *, now: datetime) -> Path:
    """Write or rewrite the revocation list, and return its path. Raises `CredentialsUnusable`."""
    with r.locked(directory):
        before = directory / r.LIST
        replace(directory, r.files_of(r.read_registry(directory), authority, before, now=now))
        return before


def _store(
    directory: Path,
    registry: r.Registry,
    entry: r.CertificateEntry,
    issued: Issued,
    out: Path | None,
    *,
    fresh: bool,
) -> IssuedFiles:
    """Add a certificate to the index, then write its files; if that fails, remove it again.

    Write-ahead: no certificate exists that the index does not have.
    """
    target = directory if out is None else out
    files = issued.files(entry.stem)
    r.write_index(directory, registry.with_entry(entry))
    try:
        (write_new if fresh else replace)(target, files)
    except BaseException:
        r.write_index(directory, registry)
        raise
    return IssuedFiles(entry=entry, issued=issued, files=tuple(target / name for name in files))


def _check_name(registry: r.Registry, name: str, now: datetime, *, again: bool) -> None:
    for entry in registry.certificates:
        if entry.kind != "client" or entry.state(now) != "valid":
            continue
        if entry.name == name and not again:
            raise errors.InvalidParams(
                f"cannot issue a certificate to {name!r}: there is a valid one "
                f"({entry.serial}), and one name is one tenant",
                remedy="renew or revoke that one, or use --again for a second of the same tenant",
            )
        if entry.name != name and _folded(entry.name) == _folded(name):
            raise errors.InvalidParams(
                f"cannot issue a certificate to {name!r}: it looks like {entry.name!r}",
                remedy="choose a name that cannot be confused with another",
            )


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


def _stem(name: str) -> str:
    """The stem of the file names of a client's certificate; no two clients share one."""
    stem = _UNFIT.sub("_", name).lstrip("-.") or "client"
    if stem in ("ca", "server"):
        stem = f"client-{stem}"
    return stem if stem == name else f"{stem}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
