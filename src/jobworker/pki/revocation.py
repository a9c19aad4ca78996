"""Revocation lists: judged before they are used, and asked about clients that are inside already.

A handshake asks the TLS context. A client that came in before a list changed is asked about here,
by OpenSSL's own X509Store through pyOpenSSL (cryptography's verifier accepts revoked certificates),
with the chain that it has presented, so that both judge alike.

What must hold: a list decides only if it is signed by its CA, lies within its time (RFC 5280,
section 5.1.2), and there is one for each CA that we trust. Everything else is refused by name; what
would be the use of a list that silently does not count? A list of a CA that we do not know yet is
the exception: a company's root is trusted, and clients bring their issuing CA's certificate along.
OpenSSL checks such a list's signature when it is used, and refuses each client whose issuer has no
good list; until then a warning tells of it (`unproven_lists`).

Where all chains end in a root of ours, and every issuer above has a list, all certificates of a
chain are looked for in the lists, an issuing CA's own too; else the client's alone (`reaches_up`).
"""

from collections.abc import Sequence
from datetime import datetime

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


@frozen
class Lists:
    """The revocation lists of a server, judged."""

    all: tuple[x509.CertificateRevocationList, ...]
    reaches_up: bool
    """Whether every trusted CA's issuer is trusted and has a list: whole chains can be asked.

    OpenSSL asks about each certificate of a chain then, its last included, which has to be a root.
    """
    unproven: tuple[x509.CertificateRevocationList, ...]
    """Those of CAs whose certificates are in none of the server's files."""


def read_lists(files: ServerFiles, now: datetime) -> Lists:
    """The lists of the server, one for each CA of `ca_cert` at least; none where it has no file.

    Raises `CredentialsUnusable`.
    """
    file = files.crl
    if file is None:
        return Lists((), False, ())
    authorities = x509.load_pem_x509_certificates(files.ca.content)
    known = [*authorities, *x509.load_pem_x509_certificates(files.certificate.content)[1:]]
    try:
        lists = read_all(file)
        for each in lists:
            if fault := _fault(each, known, now):
                raise _unusable(file, fault)
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise _unusable(file, f"it is damaged ({exc})") from None
    issuers = {each.issuer for each in lists}
    names = {each.subject for each in known}
    unproven = tuple(each for each in lists if each.issuer not in names)
    for authority in authorities:
        if authority.subject not in issuers:
            name = authority.subject.rfc4514_string()
            others = ", ".join(each.issuer.rfc4514_string() for each in unproven)
            instead = f"; it is of another CA ({others})" if others else ""
            raise _unusable(file, f"it holds no list of the CA {name}{instead}")
    trusted = {each.subject for each in authorities}
    reaches_up = all(each.issuer in issuers & trusted for each in authorities)
    return Lists(lists, reaches_up, unproven)


def read_all(file: PemFile) -> tuple[x509.CertificateRevocationList, ...]:
    """Every list of a PEM file. Raises ValueError."""
    pieces = file.content.split(_BEGIN)[1:]
    return tuple(x509.load_pem_x509_crl(_BEGIN + piece) for piece in pieces)


def unproven_lists(files: ServerFiles, now: datetime) -> tuple[str, ...]:
    """A warning for each list whose CA is not known yet. Raises `CredentialsUnusable`."""
    return tuple(
        f"the revocation list of {each.issuer.rfc4514_string()} in {files.crl.path} can be checked "
        "only when a client brings that CA's certificate along; add the certificate to "
        "security.ca_cert or to the chain in security.server_cert"
        for each in read_lists(files, now).unproven
        if files.crl is not None
    )


def _fault(
    found: x509.CertificateRevocationList, known: list[x509.Certificate], now: datetime
) -> str | None:
    named = [each for each in known if each.subject == found.issuer]
    if named and not any(found.is_signature_valid(each.public_key()) for each in named):  # type: ignore[arg-type]
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
        """By the CAs and the lists in `files`. Raises `CredentialsUnusable`."""
        store = crypto.X509Store()
        flags = crypto.X509StoreFlags.X509_STRICT
        for authority in x509.load_pem_x509_certificates(files.ca.content):
            store.add_cert(crypto.X509.from_cryptography(authority))
        lists = read_lists(files, now)
        for each in lists.all:
            store.add_crl(each)
            flags |= crypto.X509StoreFlags.CRL_CHECK
        if lists.reaches_up:
            flags |= crypto.X509StoreFlags.CRL_CHECK_ALL
        else:
            flags |= crypto.X509StoreFlags.PARTIAL_CHAIN
        store.set_flags(flags)
        return cls(store)

    def fault(self, chain: Sequence[bytes]) -> str | None:
        """Why a client's certificate is not good any more, in words; None if it is.

        `chain` is what the client has presented, in DER, its own certificate first.
        """
        try:
            peer, *between = (
                crypto.X509.from_cryptography(x509.load_der_x509_certificate(each))
                for each in chain
            )
            crypto.X509StoreContext(self._store, peer, between).verify_certificate()
        except ValueError:
            return "it cannot be read"
        except crypto.X509StoreContextError as exc:
            return _WORDS.get(int(exc.errors[0]), str(exc.errors[2]))
        return None


# X509_V_ERR_* of openssl/x509_vfy.h
_WORDS = {
    10: "it has expired",
    3: "the server has no revocation list of its CA",
    12: "the server's revocation list has expired",
    20: "it is not from the server's CA any more",
    23: "it has been revoked",
}
