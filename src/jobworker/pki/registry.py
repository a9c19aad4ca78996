"""The index of an authority's certificates, issued.json, and its revocation list.

An entry is on disk before its certificate (write-ahead), so no certificate exists that the index
does not have. Index and revocation list are written under temporary names and renamed, and a lock
on the directory serializes calls. A new list is made from the index and from the list before it:
even if the index is lost, a revoked certificate stays revoked. To revoke a certificate by its file
adds it to an index that has lost it.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Literal

from attrs import evolve, frozen
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import NameOID

from jobworker import errors
from jobworker.pki.authority import Authority
from jobworker.pki.files import CERTIFICATE_MODE, KEY_MODE, replace
from jobworker.pki.unreadable import UNREADABLE
from jobworker.regular_file import NotText, read_regular, read_text
from jobworker.serialization.convert import faults_of, unstructure
from jobworker.serialization.json_text import dumps, loads

Kind = Literal["server", "client", "CA"]

INDEX, LIST = "issued.json", "ca-crl.pem"
INDEX_BYTES_MAX = 256 << 20
"""Some half a million certificates; a bound also on the list."""

REASONS = tuple(
    flag.value
    for flag in x509.ReasonFlags
    if flag not in (x509.ReasonFlags.remove_from_crl, x509.ReasonFlags.certificate_hold)
)
"""The reasons of a permanent revocation (RFC 5280, section 5.3.1)."""


@frozen(kw_only=True)
class CertificateEntry:
    """The entry of one issued certificate."""

    serial: str
    """Upper-case hexadecimal, as `openssl x509 -serial` prints it."""
    kind: Kind
    name: str
    role: str = ""
    hosts: tuple[str, ...] = ()
    stem: str
    """Its files are STEM-cert.pem and STEM-key.pem."""
    not_before: datetime
    not_after: datetime
    fingerprint: str
    """SHA-256 of the DER form."""
    revoked_at: datetime | None = None
    reason: str | None = None

    def state(self, now: datetime) -> str:
        """Return "valid", "expired" or "revoked"."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.not_after <= now else "valid"


@frozen(kw_only=True)
class Registry:
    """All entries, in the order in which the certificates were issued."""

    list_number: int = 0
    """The number of the latest revocation list."""
    certificates: tuple[CertificateEntry, ...] = ()

    def find(self, wanted: str, *, or_file: bool = False) -> CertificateEntry:
        """Return the certificate with the serial number, or the latest one with the name, `wanted`.

        Raises `NotFound`. `or_file`: the caller also accepts a file, and the remedy says so.
        """
        plain = wanted.replace(":", "").upper().lstrip("0")
        for entry in reversed(self.certificates):
            if entry.serial.lstrip("0") == plain or entry.name == wanted:
                return entry
        raise errors.NotFound(
            f"cannot find the certificate {wanted!r}: none of that name or serial was issued here",
            remedy="see worker certs list" + ", or name the certificate's file" * or_file,
        )

    def with_entry(self, entry: CertificateEntry) -> "Registry":
        """Return the registry with `entry` added, or with the entry of its serial replaced."""
        rest = tuple(each for each in self.certificates if each.serial != entry.serial)
        if len(rest) == len(self.certificates):
            return evolve(self, certificates=(*rest, entry))
        changed = tuple(
            entry if each.serial == entry.serial else each for each in self.certificates
        )
        return evolve(self, certificates=changed)


def entry_of(certificate: x509.Certificate, kind: Kind, stem: str) -> CertificateEntry:
    """Make the entry of a certificate."""
    names = {each.oid: str(each.value) for each in certificate.subject}
    hosts: tuple[str, ...] = ()
    for extension in certificate.extensions:
        if isinstance(extension.value, x509.SubjectAlternativeName):
            hosts = tuple(str(name.value) for name in extension.value)
    return CertificateEntry(
        serial=serial_text(certificate.serial_number),
        kind=kind,
        name=names.get(NameOID.COMMON_NAME, ""),
        role=names.get(NameOID.ORGANIZATIONAL_UNIT_NAME, ""),
        hosts=hosts,
        stem=stem,
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
        fingerprint=certificate.fingerprint(hashes.SHA256()).hex(),
    )


def serial_text(serial: int) -> str:
    """Format a serial number as OpenSSL prints it: hexadecimal, whole bytes, upper case."""
    text = f"{serial:X}"
    return text if len(text) % 2 == 0 else f"0{text}"


def read_registry(directory: Path) -> Registry:
    """Read the index; it is empty if there is no file. Raises `CredentialsUnusable`."""
    path = directory / INDEX
    try:
        content = read_text(path, INDEX_BYTES_MAX)
    except FileNotFoundError:
        return Registry()
    except OSError as error:
        raise _unusable(path, error.strerror or str(error)) from None
    except NotText as error:
        raise _unusable(path, str(error)) from None
    try:
        registry, faults = faults_of(Registry, loads(content))
    except errors.MalformedJSON as error:
        raise _unusable(path, error.message) from None
    if registry is None:
        raise _unusable(path, "; ".join(map(str, faults)))
    return registry


def _unusable(path: Path, why: str) -> errors.CredentialsUnusable:
    return errors.CredentialsUnusable(
        f"cannot use the index {path}: {why}",
        remedy="restore it from a backup, or move it away: revoked certificates stay revoked, but "
        "all names and serials are lost, so a name may be issued twice, no certificate can be "
        "renewed, and only its file can revoke one (worker certs revoke FILE)",
    )


def files_of(
    registry: Registry, authority: Authority, before: Path | None, *, now: datetime
) -> dict[str, tuple[bytes, int]]:
    """Return the files to write: the index, and a new revocation list that includes `before`."""
    registry = evolve(registry, list_number=registry.list_number + 1)
    made = authority.revocation_list(_revoked(registry, before), registry.list_number, now=now)
    return {INDEX: (index_bytes(registry), KEY_MODE), LIST: (made, CERTIFICATE_MODE)}


def index_bytes(registry: Registry) -> bytes:
    """The content of the index file."""
    return dumps(unstructure(registry)).encode() + b"\n"


def _revoked(registry: Registry, before: Path | None) -> Iterator[x509.RevokedCertificate]:
    builder = x509.RevokedCertificateBuilder()
    named = set()
    for entry in registry.certificates:
        if entry.revoked_at is not None:
            serial = int(entry.serial, 16)
            named.add(serial)
            one = builder.serial_number(serial).revocation_date(entry.revoked_at)
            if entry.reason and entry.reason != x509.ReasonFlags.unspecified.value:
                reason = x509.CRLReason(x509.ReasonFlags(entry.reason))
                one = one.add_extension(reason, critical=False)
            yield one.build()
    if before is None:
        return
    try:
        earlier = x509.load_pem_x509_crl(read_regular(before, INDEX_BYTES_MAX))
    except FileNotFoundError:
        return
    except (OSError, *UNREADABLE) as error:
        raise errors.CredentialsUnusable(
            f"cannot use the revocation list {before}: {error}",
            remedy="restore it from a backup, or move it away if nothing was ever revoked",
        ) from None
    for revoked in earlier:
        if revoked.serial_number not in named:
            yield revoked


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold an exclusive lock on an authority's directory for the block."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise errors.CredentialsUnusable(
            f"cannot use the directory {directory}: {os.strerror(error.errno or 0)}",
            remedy="name the directory that 'worker certs init' made",
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_index(directory: Path, registry: Registry) -> None:
    """Replace the index. Raises `CredentialsUnusable`."""
    replace(directory, {INDEX: (index_bytes(registry), KEY_MODE)})
