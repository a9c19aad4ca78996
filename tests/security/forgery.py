"""Certificates of any kind, good and bad, as an attacker or a careless authority makes them."""

import ssl
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from attrs import define
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from OpenSSL import crypto

from jobworker.pki.authority import Authority

CN, OU, O = (  # noqa: E741
    NameOID.COMMON_NAME,
    NameOID.ORGANIZATIONAL_UNIT_NAME,
    NameOID.ORGANIZATION_NAME,
)
Subject = Sequence[Sequence[tuple[x509.ObjectIdentifier, str]]]
"""Relative names, each of one attribute or several."""

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


def _now() -> datetime:
    return datetime.now(UTC)


def good_name(name: str = "mallory", role: str = "admin") -> Subject:
    return [[(OU, role)], [(CN, name)]]


@define(eq=False)
class Forger:
    """Makes certificates with an authority's key, and contexts that bear them."""

    authority: Authority
    directory: Path
    _made: int = 0

    def context(
        self,
        subject: Subject | None = None,
        *,
        purpose: x509.ObjectIdentifier = ExtendedKeyUsageOID.CLIENT_AUTH,
        valid: tuple[timedelta, timedelta] = (-timedelta(hours=1), timedelta(hours=1)),
        key: Literal["ec", "rsa1024", "rsa2048"] = "ec",
        sha1: bool = False,
        trusting: Path | None = None,
    ) -> ssl.SSLContext:
        """A client's context, of someone who keeps to no rules, with a certificate made for it."""
        pair = self._key(key)
        certificate = self._certificate(pair, subject or good_name(), purpose, valid)
        if sha1:
            certificate = _signed_again(certificate, self.authority)
        self._made += 1
        path = self.directory / f"forged-{self._made}.pem"
        path.write_bytes(
            pair.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            + certificate.public_bytes(serialization.Encoding.PEM)
        )
        context = bare_context(trusting or self.directory / "ca-cert.pem")
        context.load_cert_chain(path)
        return context

    def _key(self, kind: str) -> Key:
        if kind == "ec":
            return ec.generate_private_key(ec.SECP256R1())
        return rsa.generate_private_key(65537, int(kind.removeprefix("rsa")))

    def _certificate(
        self,
        key: Key,
        subject: Subject,
        purpose: x509.ObjectIdentifier,
        valid: tuple[timedelta, timedelta],
    ) -> x509.Certificate:
        root, now = self.authority.root, _now()
        name = x509.Name(
            x509.RelativeDistinguishedName(
                [x509.NameAttribute(oid, value, _validate=False) for oid, value in relative]
            )
            for relative in subject
        )
        own = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        issuers = x509.AuthorityKeyIdentifier.from_issuer_public_key(root.key.public_key())
        builder = (
            x509.CertificateBuilder(root.certificate.subject, name, key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + valid[0])
            .not_valid_after(now + valid[1])
            .add_extension(own, critical=False)
            .add_extension(issuers, critical=False)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        )
        return builder.sign(root.key, hashes.SHA256())


def _signed_again(certificate: x509.Certificate, authority: Authority) -> x509.Certificate:
    """By SHA-1, which cryptography makes no signatures with any more."""
    made = crypto.X509.from_cryptography(certificate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        made.sign(crypto.PKey.from_cryptography_key(authority.root.key), "sha1")
    return made.to_cryptography()


def bare_context(ca: Path) -> ssl.SSLContext:
    """A client's context without a certificate, at the lowest security level there is."""
    context = ssl.create_default_context(cafile=ca)
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    return context
