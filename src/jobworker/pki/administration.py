"""What an administrator does with an authority's directory: init, issue, renew, revoke.

    ca-cert.pem ca-key.pem     the authority
    ca-crl.pem                 what it has revoked; the service reads it
    issued.json                what it has issued (`registry`)
    NAME-cert.pem NAME-key.pem server's and clients' own

A name is a tenant, so a second living certificate of a name is asked for by `again` and never made
by mistake; a name that differs from a living one only in case or form is refused in any case.
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
from jobworker.pki.files import replace, write_new
from jobworker.pki.reading import read_certificate

ALWAYS_HOSTS = ("localhost", "127.0.0.1", "::1")

CLIENT_ROLES = ("admin", "viewer")

_UNFIT = re.compile(r"[^A-Za-z0-9._@-]")


@frozen(kw_only=True)
class Summary:
    """What `init_authority` made. `hosts` are the names that the server's certificate bears."""

    directory: Path
    files: tuple[Path, ...]
    hosts: tuple[str, ...]
    not_after: datetime
    ca_not_after: datetime


@frozen(kw_only=True)
class Made:
    """A certificate that was issued, and where its files stand."""

    entry: r.Entry
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
) -> Summary:
    """Make a CA, a server's and two clients' certificates, and write all ten files.

    The server's certificate bears localhost, 127.0.0.1, ::1 and `hosts`. With a `passphrase` the
    CA's key is encrypted. Raises `InvalidParams` for a bad host or number of days, and
    `CredentialsUnusable` where a file is there already or cannot be written; then no file of this
    call is left.
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
    return Summary(
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
) -> Made:
    """Issue a client's certificate, and write its two files to `out` (else `directory`).

    Raises `InvalidParams`, also where the name is taken, and `CredentialsUnusable`.
    """
    with r.locked(directory):
        registry = r.read_registry(directory)
        _check_name(registry, name, now, again=again)
        issued = authority.issue_client(name, role, now=now, days=days)
        entry = r.entry_of(issued.certificate, "client", _stem(name))
        return _keep(directory, registry, entry, issued, out, fresh=True)


def issue_server(
    directory: Path,
    authority: Authority,
    hosts: Sequence[str],
    *,
    now: datetime,
    days: int = 365,
    out: Path | None = None,
) -> Made:
    """Issue a server's certificate for `hosts`. Raises as `issue_client` does."""
    with r.locked(directory):
        issued = authority.issue_server(hosts, now=now, days=days)
        entry = r.entry_of(issued.certificate, "server", "server")
        return _keep(directory, r.read_registry(directory), entry, issued, out, fresh=True)


def renew(
    directory: Path,
    authority: Authority,
    wanted: str,
    *,
    now: datetime,
    days: int = 365,
    hosts: Sequence[str] = (),
    out: Path | None = None,
) -> Made:
    """Issue a successor, with a key of its own, to a certificate named by name or serial.

    Its files take the place of the old ones where they stand. The old certificate stays good until
    it ends or is revoked. A server's bears `hosts` besides those of the old one. Raises `NotFound`,
    `InvalidParams` if it was revoked or `hosts` are for a client, and `CredentialsUnusable`.
    """
    with r.locked(directory):
        registry = r.read_registry(directory)
        old = registry.find(wanted)
        if old.revoked_at is not None:
            raise errors.InvalidParams(
                f"cannot renew the certificate {old.serial} of {old.name!r}: it was revoked",
                remedy="issue a new one, if it is to be: worker certs issue",
            )
        if hosts and old.kind != "server":
            raise errors.InvalidParams(
                f"cannot renew the certificate of {old.name!r} with --host: it is not a server's",
                remedy="renew it without",
            )
        if old.kind == "server":
            issued = authority.issue_server([*old.hosts, *hosts], now=now, days=days)
        else:
            issued = authority.issue_client(old.name, old.role, now=now, days=days)
        entry = r.entry_of(issued.certificate, old.kind, old.stem)
        return _keep(directory, registry, entry, issued, out, fresh=False)


def revoke(
    directory: Path, authority: Authority, wanted: str | Path, *, now: datetime, reason: str = ""
) -> tuple[r.Entry, ...]:
    """Revoke a certificate by serial or file, or every living one of a name; write the list anew.

    Those that were revoked before stay as they are. Raises `NotFound`, `CredentialsUnusable`, and
    `InvalidParams` for the file of a certificate that this authority has not signed.
    """
    with r.locked(directory):
        registry = r.read_registry(directory)
        if isinstance(wanted, Path):
            entry = _signed_here(authority, wanted)
            wanted = entry.serial
            if all(each.serial != wanted for each in registry.certificates):  # the index lost it
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


def _signed_here(authority: Authority, path: Path) -> r.Entry:
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
    """Write the revocation list anew, or for the first time. Raises `CredentialsUnusable`."""
    with r.locked(directory):
        before = directory / r.LIST
        replace(directory, r.files_of(r.read_registry(directory), authority, before, now=now))
        return before


def _keep(
    directory: Path,
    registry: r.Registry,
    entry: r.Entry,
    issued: Issued,
    out: Path | None,
    *,
    fresh: bool,
) -> Made:
    """Put a certificate into the index, then write its files; take it out again if that fails."""
    target = directory if out is None else out
    files = issued.files(entry.stem)
    r.write_index(directory, registry.with_entry(entry))
    try:
        (write_new if fresh else replace)(target, files)
    except BaseException:
        r.write_index(directory, registry)
        raise
    return Made(entry=entry, issued=issued, files=tuple(target / name for name in files))


def _check_name(registry: r.Registry, name: str, now: datetime, *, again: bool) -> None:
    for entry in registry.certificates:
        if entry.kind != "client" or entry.state(now) != "valid":
            continue
        if entry.name == name and not again:
            raise errors.InvalidParams(
                f"cannot issue a certificate to {name!r}: there is a valid one "
                f"({entry.serial}), and one name is one tenant",
                remedy="renew or revoke that one, or say --again for a second of the same tenant",
            )
        if entry.name != name and _folded(entry.name) == _folded(name):
            raise errors.InvalidParams(
                f"cannot issue a certificate to {name!r}: people would take it for {entry.name!r}",
                remedy="choose a name that cannot be mistaken",
            )


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


def _stem(name: str) -> str:
    """What the files of a client's certificate are called: no two names share one."""
    stem = _UNFIT.sub("_", name).lstrip("-.")
    if stem in ("ca", "server"):
        stem = f"client-{stem}"
    return stem if stem == name else f"{stem}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
