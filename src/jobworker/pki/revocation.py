"""Revocation lists: judged before they are used, and asked about clients that are inside already.

A handshake asks the TLS context. A client that came in before a list changed is asked about here,
by OpenSSL's own X509Store through pyOpenSSL (cryptography's verifier accepts revoked certificates).

What must hold: a list decides only if it is signed by a CA that we trust, lies within its time
(RFC 5280, section 5.1.2), and there is one for each CA. Everything else is refused by name; what
would be the use of a list that silently does not count?
"""

from datetime import UTC, datetime

from attrs import frozen
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from OpenSSL import crypto

from jobworker import errors
from jobworker.pki.credentials import PemFile
from jobworker.pki.material import CRL_REMEDY, ServerFiles

_BEGIN = b"-----BEGIN X509 CRL-----"
_WEAK = (hashes.SHA1, hashes.MD5)


def check_lists(crl: PemFile, ca: PemFile) -> None:
    """Raise `CredentialsUnusable` unless the lists are good at this moment."""
    read_lists(crl, x509.load_pem_x509_certificates(ca.content), datetime.now(UTC))


def read_lists(
    file: PemFile, authorities: list[x509.Certificate], now: datetime
) -> list[x509.CertificateRevocationList]:
    """The lists of a PEM file, one for each authority. Raises `CredentialsUnusable`."""
    try:
        pieces = file.content.split(_BEGIN)[1:]
        lists = [x509.load_pem_x509_crl(_BEGIN + piece) for piece in pieces]
        for each in lists:
            if fault := _fault(each, authorities, now):
                raise _unusable(file, fault)
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise _unusable(file, f"it is damaged ({exc})") from None
    issuers = {each.issuer for each in lists}
    for authority in authorities:
        if authority.subject not in issuers:
            name = authority.subject.rfc4514_string()
            raise _unusable(file, f"it holds no list of the CA {name}")
    return lists


def _fault(
    found: x509.CertificateRevocationList, authorities: list[x509.Certificate], now: datetime
) -> str | None:
    named = [each for each in authorities if each.subject == found.issuer]
    if not named:
        return f"it is of another CA ({found.issuer.rfc4514_string()})"
    if not any(found.is_signature_valid(each.public_key()) for each in named):  # type: ignore[arg-type]
        return "its signature is not the CA's"
    if isinstance(found.signature_hash_algorithm, _WEAK):
        return f"its signature is too weak ({found.signature_hash_algorithm.name})"
    if found.last_update_utc > now:
        return f"it is not valid before {found.last_update_utc.isoformat()}; check the clock"
    end = found.next_update_utc
    if end is None:
        return "it does not say until when it is valid"
    return f"it expired at {end.isoformat()}" if end <= now else None


def _unusable(file: PemFile, why: str) -> errors.CredentialsUnusable:
    return errors.CredentialsUnusable(
        f"cannot use the revocation list {file.path}: {why}", remedy=CRL_REMEDY
    )


@frozen
class Verifier:
    """Judges the certificates of clients that are connected."""

    _store: crypto.X509Store

    @classmethod
    def of(cls, files: ServerFiles, now: datetime) -> "Verifier":
        """By the CA and the lists in `files`. Raises `CredentialsUnusable`."""
        store = crypto.X509Store()
        flags = crypto.X509StoreFlags.X509_STRICT
        authorities = x509.load_pem_x509_certificates(files.ca.content)
        for authority in authorities:
            store.add_cert(crypto.X509.from_cryptography(authority))
        if files.crl is not None:
            for each in read_lists(files.crl, authorities, now):
                store.add_crl(each)
            flags |= crypto.X509StoreFlags.CRL_CHECK
        store.set_flags(flags)
        return cls(store)

    def fault(self, certificate: bytes) -> str | None:
        """Why a client's certificate (DER) is not good any more, in words; None if it is."""
        try:
            peer = crypto.X509.from_cryptography(x509.load_der_x509_certificate(certificate))
            crypto.X509StoreContext(self._store, peer).verify_certificate()
        except ValueError:
            return "it cannot be read"
        except crypto.X509StoreContextError as exc:
            return _WORDS.get(int(exc.errors[0]), str(exc.errors[2]))
        return None


# X509_V_ERR_* of openssl/x509_vfy.h
_WORDS = {
    10: "it has expired",
    12: "the server's revocation list has expired",
    20: "it is not from the server's CA any more",
    23: "it has been revoked",
}
