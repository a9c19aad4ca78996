"""The certificate authority of one installation: makes the keys and certificates of both ends.

One root signs everything and nothing stands between, so pathlen is 0. Who may do what is in the
certificate: extended key usage keeps a client's from posing as a server and a server's from
logging in, and a client's only OU is its role. Server certificates bear no OU. All of it must
pass OpenSSL's X509_V_FLAG_X509_STRICT (RFC 5280), because both ends switch that on.

How the files reach the disk, closed and all or none, is told in `files`. Times come in as
arguments. Importing this costs cryptography (some 30 ms), so the command line does it only for
`worker certs`.
"""

import ipaddress
import re
import unicodedata
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

from attrs import field, frozen
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from jobworker import errors
from jobworker.pki.credentials import read_pem
from jobworker.pki.files import CERTIFICATE_MODE, KEY_MODE, write_new
from jobworker.pki.identity import name_fault

ORGANIZATION = "jobworker"

ALWAYS_HOSTS = ("localhost", "127.0.0.1", "::1")

CLIENT_ROLES = ("admin", "viewer")

CLOCK_SKEW = timedelta(minutes=5)  # a peer whose clock is behind takes a new certificate too

DAYS_MAX = 36_500

_LOAD_REMEDY = "name the directory that 'worker certs init' made"

_LABEL = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)", re.ASCII)  # RFC 1123, section 2.1


@frozen(kw_only=True)
class Issued:
    """A certificate with its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)

    def files(self, stem: str) -> dict[str, tuple[bytes, int]]:
        """The content and mode of STEM-cert.pem and STEM-key.pem."""
        certificate = self.certificate.public_bytes(serialization.Encoding.PEM)
        key = self.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        return {
            f"{stem}-key.pem": (key, KEY_MODE),
            f"{stem}-cert.pem": (certificate, CERTIFICATE_MODE),
        }


@frozen(kw_only=True)
class Summary:
    """What `init_authority` made. `hosts` are the names that the server's certificate bears."""

    directory: Path
    files: tuple[Path, ...]
    hosts: tuple[str, ...]
    not_after: datetime
    ca_not_after: datetime


@frozen(kw_only=True)
class Authority:
    """A root certificate and its key, able to issue."""

    root: Issued

    @classmethod
    def create(cls, *, now: datetime, days: int = 3650) -> Self:
        """Make a new root, valid for `days` (1 to 36,500) from `now`."""
        key = ec.generate_private_key(ec.SECP256R1())
        public = key.public_key()
        # Own names keep two authorities apart, for people and for OpenSSL's look-up by name.
        mark = x509.SubjectKeyIdentifier.from_public_key(public).digest.hex()[:8]
        name = _subject(f"jobworker CA {mark}")
        usage = _key_usage(key_cert_sign=True, crl_sign=True)
        certificate = (
            _builder(name, name, public, public, _validity(now, days))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .sign(key, hashes.SHA256())
        )
        return cls(root=Issued(certificate=certificate, key=key))

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read ca-cert.pem and ca-key.pem. Raises `CredentialsUnusable`."""
        paths = directory / "ca-cert.pem", directory / "ca-key.pem"
        pem = read_pem(paths[0], "CA certificate", "CERTIFICATE", _LOAD_REMEDY)
        key_pem = read_pem(paths[1], "CA key", "PRIVATE KEY", _LOAD_REMEDY)
        try:
            certificate = x509.load_pem_x509_certificate(pem)
            constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
        except (ValueError, x509.ExtensionNotFound) as exc:
            raise _unusable(paths[0], f"it is damaged or no CA's ({exc})") from None
        if not constraints.value.ca:
            raise _unusable(paths[0], "it is not a CA's")
        try:
            key = serialization.load_pem_private_key(key_pem, password=None)
        except TypeError:
            raise _unusable(paths[1], "it is encrypted") from None
        except (ValueError, UnsupportedAlgorithm) as exc:
            raise _unusable(paths[1], f"it is damaged ({exc})") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise _unusable(paths[1], "it is not an elliptic curve key")
        if key.public_key() != certificate.public_key():
            raise _unusable(paths[1], f"it does not belong to {paths[0]}")
        return cls(root=Issued(certificate=certificate, key=key))

    def issue_server(self, hosts: Sequence[str], *, now: datetime, days: int = 365) -> Issued:
        """Issue a server's certificate for `hosts`, names or addresses, at least one.

        Raises `InvalidParams` for a host that a certificate cannot bear.
        """
        names = dict.fromkeys(general_name(host) for host in hosts)
        if not names:
            raise errors.InvalidParams("cannot issue a server certificate: no host is named")
        alternative = x509.SubjectAlternativeName(names)
        purpose = ExtendedKeyUsageOID.SERVER_AUTH
        return self._issue(_subject("server"), purpose, now, days, alternative)

    def issue_client(self, name: str, role: str, *, now: datetime, days: int = 365) -> Issued:
        """Issue a client's certificate: CN `name`, OU `role`, each 1 to 64 printable characters.

        Raises `InvalidParams`.
        """
        for what, value in (("name", name), ("role", role)):
            if fault := name_fault(value):
                raise errors.InvalidParams(f"cannot issue a client certificate: the {what} {fault}")
        return self._issue(_subject(name, role), ExtendedKeyUsageOID.CLIENT_AUTH, now, days)

    def _issue(
        self,
        subject: x509.Name,
        purpose: x509.ObjectIdentifier,
        now: datetime,
        days: int,
        alternative: x509.SubjectAlternativeName | None = None,
    ) -> Issued:
        root = self.root.certificate
        start, end = _validity(now, days)
        if now >= root.not_valid_after_utc:
            raise errors.CredentialsUnusable(
                f"cannot issue a certificate: the CA expired at {root.not_valid_after_utc}",
                remedy="make a new one in another directory: worker certs init --dir DIR",
            )
        # A certificate outside its issuer's time would fail with a puzzling reason.
        start, end = max(start, root.not_valid_before_utc), min(end, root.not_valid_after_utc)
        key = ec.generate_private_key(ec.SECP256R1())
        issuer_key = self.root.key.public_key()
        builder = (
            _builder(subject, root.subject, key.public_key(), issuer_key, (start, end))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        )
        if alternative is not None:
            builder = builder.add_extension(alternative, critical=False)
        return Issued(certificate=builder.sign(self.root.key, hashes.SHA256()), key=key)


def init_authority(
    directory: Path, hosts: Sequence[str], *, now: datetime, days: int = 365, ca_days: int = 3650
) -> Summary:
    """Make a CA, a server's and two clients' certificates, and write all eight files.

    The server's certificate bears localhost, 127.0.0.1, ::1 and `hosts`. Raises `InvalidParams`
    for a bad host or number of days, and `CredentialsUnusable` where a file is there already or
    cannot be written; then no file of this call is left.
    """
    authority = Authority.create(now=now, days=ca_days)
    server = authority.issue_server([*ALWAYS_HOSTS, *hosts], now=now, days=days)
    files = authority.root.files("ca") | server.files("server")
    for role in CLIENT_ROLES:
        name = f"{role}-client"
        files |= authority.issue_client(name, role, now=now, days=days).files(name)
    write_new(directory, files)
    alternative = server.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return Summary(
        directory=directory,
        files=tuple(directory / name for name in files),
        hosts=tuple(str(name.value) for name in alternative.value),
        not_after=server.certificate.not_valid_after_utc,
        ca_not_after=authority.root.certificate.not_valid_after_utc,
    )


def general_name(host: str) -> x509.DNSName | x509.IPAddress:
    """Turn an IP literal or a host name into what a certificate bears, lower-case and IDNA.

    IDNA as of RFC 3490, as Python's ssl module encodes the name that it checks. Names that this
    would change into others (straße.de into strasse.de) are refused, as are wildcards. Raises
    `InvalidParams`.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return x509.DNSName(_dns_name(host))
    if isinstance(address, ipaddress.IPv6Address) and address.scope_id is not None:
        raise _bad_host(host, "a certificate cannot bear an address's zone")
    return x509.IPAddress(address)


def _dns_name(host: str) -> str:
    name = unicodedata.normalize("NFC", host.lower())
    if "*" in name:
        raise _bad_host(host, "wildcards are not issued; name each host")
    if len(name) > 253:  # RFC 1035, section 2.3.4; bounds the codec below too
        raise _bad_host(host[:60] + "…", "a host name has at most 253 characters")
    try:
        encoded = name.encode("idna").decode("ascii").lower()
        same = name.isascii() or encoded.encode("ascii").decode("idna") == name
    except UnicodeError as exc:
        raise _bad_host(host, f"it is not a host name ({exc})") from None
    if not same:
        raise _bad_host(host, f"IDNA turns it into another name, {encoded}")
    labels = encoded.split(".")
    if len(encoded) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise _bad_host(host, "a host name is letters, digits and hyphens, parted by dots")
    if labels[-1].isdecimal():
        raise _bad_host(host, "it looks like an IP address and is none")
    return encoded


def _bad_host(host: str, why: str) -> errors.InvalidParams:
    remedy = "give a name as in 'worker1.example.org', or an address without port or brackets"
    return errors.InvalidParams(f"cannot use the host {host!r}: {why}", remedy=remedy)


def _unusable(path: Path, why: str) -> errors.CredentialsUnusable:
    return errors.CredentialsUnusable(f"cannot use {path}: {why}", remedy=_LOAD_REMEDY)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    validity: tuple[datetime, datetime],
) -> x509.CertificateBuilder:
    """What all certificates have: names, a random serial of 159 bits, times, key identifiers."""
    own = x509.SubjectKeyIdentifier.from_public_key(key)
    issuers = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(validity[0])
        .not_valid_after(validity[1])
        .add_extension(own, critical=False)
        .add_extension(issuers, critical=False)
    )


def _subject(common_name: str, unit: str | None = None) -> x509.Name:
    attributes = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, ORGANIZATION)]
    if unit is not None:
        attributes.append(x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit))
    attributes.append(x509.NameAttribute(NameOID.COMMON_NAME, common_name))
    return x509.Name(attributes)


def _key_usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _validity(now: datetime, days: int) -> tuple[datetime, datetime]:
    if now.tzinfo is None:
        raise ValueError("now must carry its time zone")
    if not 1 <= days <= DAYS_MAX:
        raise errors.InvalidParams(
            f"cannot issue a certificate for {days} days: 1 to {DAYS_MAX} are possible"
        )
    start = now.astimezone(UTC)
    return start - CLOCK_SKEW, start + timedelta(days=days)
