"""The certificate authority of an installation: makes keys and certificates of server and clients.

One root signs every certificate, without intermediate CAs, so its pathlen is 0. A certificate
itself states what its holder may do. The extended key usage keeps a client from posing as a server
and a server from logging in. A client's only OU is its role; server certificates have no OU. All
certificates must pass OpenSSL's X509_V_FLAG_X509_STRICT (RFC 5280), which both ends set.

`files` writes the files to disk, and `registry` records what was issued to whom. Times come in as
arguments. Importing this module imports cryptography (some 30 ms), so the command line imports it
only for `worker certs`.
"""

from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

from attrs import field, frozen
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import pkcs12
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from jobworker import errors
from jobworker.pki.credentials import PemFile, read_pem
from jobworker.pki.files import CERTIFICATE_MODE, KEY_MODE
from jobworker.pki.host_names import general_name
from jobworker.pki.identity import name_fault
from jobworker.pki.unreadable import UNREADABLE

ORGANIZATION = "jobworker"
_CA_NAME = "jobworker CA "

CLOCK_SKEW = timedelta(minutes=5)  # a peer whose clock is behind accepts a new certificate too

DAYS_MAX = 36_500

_LOAD_REMEDY = "name the directory that 'worker certs init' made"


@frozen(kw_only=True)
class Issued:
    """A certificate with its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)

    def files(self, stem: str, passphrase: bytes | None = None) -> dict[str, tuple[bytes, int]]:
        """The content and mode of STEM-cert.pem and STEM-key.pem; a passphrase encrypts the key."""
        certificate = self.certificate.public_bytes(serialization.Encoding.PEM)
        key = self.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption()
            if passphrase is None
            else serialization.BestAvailableEncryption(passphrase),
        )
        return {
            f"{stem}-key.pem": (key, KEY_MODE),
            f"{stem}-cert.pem": (certificate, CERTIFICATE_MODE),
        }

    def pkcs12(self, name: str, ca: x509.Certificate, password: bytes) -> bytes:
        """Certificate, key and CA in one encrypted PKCS #12 bundle (RFC 7292) for a browser."""
        return pkcs12.serialize_key_and_certificates(
            name.encode(),
            self.key,
            self.certificate,
            [ca],
            serialization.BestAvailableEncryption(password),
        )


@frozen(kw_only=True)
class Authority:
    """A root certificate and its key; issues certificates."""

    root: Issued

    @classmethod
    def create(cls, *, now: datetime, days: int = 3650) -> Self:
        """Make a new root, valid for `days` (1 to 36,500) from `now`."""
        key = ec.generate_private_key(ec.SECP256R1())
        public = key.public_key()
        # A name of its own distinguishes two authorities, for people and for OpenSSL's look-up.
        mark = x509.SubjectKeyIdentifier.from_public_key(public).digest.hex()[:8]
        name = _subject(f"{_CA_NAME}{mark}")
        usage = _key_usage(key_cert_sign=True, crl_sign=True)
        certificate = (
            _builder(name, name, public, public, _validity(now, days))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .sign(key, hashes.SHA256())
        )
        return cls(root=Issued(certificate=certificate, key=key))

    @classmethod
    def load(cls, directory: Path, passphrase: Callable[[], bytes] | None = None) -> Self:
        """Read ca-cert.pem and ca-key.pem; call `passphrase` if the key is encrypted.

        Raises `CredentialsUnusable`.
        """
        paths = directory / "ca-cert.pem", directory / "ca-key.pem"
        pem = read_pem(paths[0], "CA certificate", "CERTIFICATE", _LOAD_REMEDY)
        key_pem = read_pem(paths[1], "CA key", "PRIVATE KEY", _LOAD_REMEDY)
        try:
            certificate = x509.load_pem_x509_certificate(pem.content)
            constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
            public = certificate.public_key()
        except (*UNREADABLE, x509.ExtensionNotFound) as exc:
            raise _unusable(paths[0], f"it is damaged or not a CA certificate ({exc})") from None
        if not constraints.value.ca:
            raise _unusable(paths[0], "it is not a CA certificate")
        key = _load_key(key_pem, passphrase)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise _unusable(paths[1], "it is not an elliptic curve key")
        if key.public_key() != public:
            raise _unusable(paths[1], f"it does not belong to {paths[0]}")
        return cls(root=Issued(certificate=certificate, key=key))

    def issue_server(self, hosts: Sequence[str], *, now: datetime, days: int = 365) -> Issued:
        """Issue a server's certificate for `hosts`, names or addresses, at least one.

        Raises `InvalidParams` for a host that a certificate cannot contain.
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

    def revocation_list(
        self, revoked: Iterable[x509.RevokedCertificate], number: int, *, now: datetime
    ) -> bytes:
        """Make the revocation list (PEM) of `revoked`; `number` is one more than in the list before
        (RFC 5280, 5.2.3).

        The list is valid as long as the CA. It lies on the server's own disk, so a shorter validity
        would only force an administrator to rewrite an unchanged list.
        """
        root = self.root.certificate
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.root.key.public_key())
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(root.subject)
            .last_update(max(_validity(now, 1)[0], root.not_valid_before_utc))
            .next_update(root.not_valid_after_utc)
            .add_extension(issuer, critical=False)
            .add_extension(x509.CRLNumber(number), critical=False)
        )
        for each in revoked:
            builder = builder.add_revoked_certificate(each)
        made = builder.sign(self.root.key, hashes.SHA256())
        return made.public_bytes(serialization.Encoding.PEM)

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
        # Outside of its issuer's validity, a certificate would fail with an unclear reason.
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


def is_made_here(authority: x509.Name) -> bool:
    """Whether an authority of this name was probably made by `Authority.create`."""
    found = {each.oid: str(each.value) for each in authority}
    return found.get(NameOID.ORGANIZATION_NAME) == ORGANIZATION and found.get(
        NameOID.COMMON_NAME, ""
    ).startswith(_CA_NAME)


def _load_key(file: PemFile, passphrase: Callable[[], bytes] | None) -> PrivateKeyTypes:
    secret = None
    try:
        try:
            return serialization.load_pem_private_key(file.content, password=None)
        except TypeError:  # it is encrypted
            if passphrase is None:
                raise _unusable(file.path, "it is encrypted") from None
            secret = passphrase()
            return serialization.load_pem_private_key(file.content, password=secret)
    except (ValueError, UnsupportedAlgorithm) as exc:
        why = f"it is damaged ({exc})" if secret is None else "the passphrase is wrong"
        raise _unusable(file.path, why) from None


def _unusable(path: Path, why: str) -> errors.CredentialsUnusable:
    return errors.CredentialsUnusable(f"cannot use {path}: {why}", remedy=_LOAD_REMEDY)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    validity: tuple[datetime, datetime],
) -> x509.CertificateBuilder:
    """Begin a certificate: names, a random serial of 159 bits, validity, key identifiers."""
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
