"""Check revocation lists before use, and check connected clients against a new list.

During a handshake, the TLS context checks the client. A client that connected before a list changed
is checked here, with the certificates that it has presented and with OpenSSL's own X509Store
(through pyOpenSSL). That is another version of OpenSSL than Python's, so lists about which versions
disagree are refused (`list_scope`). The verifier of cryptography was rejected: it accepts revoked
certificates.

A list is accepted only if its CA has signed it, it is within its validity (RFC 5280, section 5.1.2)
and it is complete, and each trusted CA must have a list. Otherwise the file is refused with the
reason, because a list that is silently ignored protects nobody.

One exception is a list of a CA that the server does not know yet, an unproven list: a company's
root is trusted, and clients send their issuing CA's certificate. OpenSSL verifies the signature of
such a list when a client needs it, and refuses each client whose issuer has no valid list. Until
then, a warning names the list (`list_warnings`).

If all chains end in a trusted root and every issuer has a list, all certificates of a chain are
checked, also those of issuing CAs. Otherwise, only the client's own is checked (`reaches_up`).
"""

from collections.abc import Sequence
from datetime import datetime

from attrs import frozen
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from OpenSSL import crypto

from jobworker import errors
from jobworker.pki.credentials import PemFile
from jobworker.pki.list_scope import distribution_point, scope_fault
from jobworker.pki.server_files import CRL_REMEDY, ServerFiles
from jobworker.pki.unreadable import UNREADABLE

_BEGIN = b"-----BEGIN X509 CRL-----"
_WEAK = (hashes.SHA1, hashes.MD5)


@frozen
class RevocationLists:
    """The revocation lists of a server, after the check."""

    all: tuple[x509.CertificateRevocationList, ...]
    reaches_up: bool
    """Whether every trusted CA's issuer is trusted and has a list: whole chains can be checked.

    OpenSSL then checks each certificate of a chain, also the last one, which has to be a root.
    """
    unproven: tuple[x509.CertificateRevocationList, ...]
    """The lists of CAs whose certificates are in none of the server's files."""


def read_lists(files: ServerFiles, now: datetime) -> RevocationLists:
    """Read and check the server's lists: at least one for each CA of `ca_cert`.

    There are none if the server has no such file. Raises `CredentialsUnusable`.
    """
    file = files.crl
    if file is None:
        return RevocationLists((), False, ())
    authorities = x509.load_pem_x509_certificates(files.ca.content)
    known = [*authorities, *x509.load_pem_x509_certificates(files.certificate.content)[1:]]
    lists = read_all(file)
    try:
        for each in lists:
            if fault := _fault(each, known, now):
                raise _unusable(file, fault)
    except UNREADABLE as exc:
        raise _unusable(file, f"it is damaged ({exc})") from None
    issuers = {each.issuer for each in lists}
    names = {each.subject for each in known}
    unproven = tuple(each for each in lists if each.issuer not in names)
    for authority in authorities:
        if authority.subject not in issuers:
            name = authority.subject.rfc4514_string()
            others = ", ".join(each.issuer.rfc4514_string() for each in unproven)
            instead = f"; it is from another CA ({others})" if others else ""
            raise _unusable(file, f"it contains no list of the CA {name}{instead}")
    trusted = {each.subject for each in authorities}
    reaches_up = all(each.issuer in issuers & trusted for each in authorities)
    complete = {each.issuer for each in lists if distribution_point(each) is None}
    for root in trusted - complete if reaches_up else ():
        point = f"its list of {root.rfc4514_string()} is only for a distribution point"
        raise _unusable(file, f"{point}, and so not for the certificate of that root itself")
    return RevocationLists(lists, reaches_up, unproven)


def read_all(file: PemFile) -> tuple[x509.CertificateRevocationList, ...]:
    """Read every list of a PEM file. Raises `CredentialsUnusable`."""
    pieces = file.content.split(_BEGIN)[1:]
    try:
        return tuple(x509.load_pem_x509_crl(_BEGIN + piece) for piece in pieces)
    except UNREADABLE as exc:
        raise _unusable(file, f"it is damaged ({exc})") from None


def list_warnings(files: ServerFiles, now: datetime) -> tuple[str, ...]:
    """Return a warning for each list of an unknown CA, and for each of a distribution point.

    Raises `CredentialsUnusable`.
    """
    if files.crl is None:
        return ()
    lists = read_lists(files, now)
    warnings = []
    for each in lists.all:
        its = f"the revocation list of {each.issuer.rfc4514_string()} in {files.crl.path}"
        if each in lists.unproven:
            warnings.append(
                f"{its} can be checked only when a client sends that CA's certificate; add the "
                "certificate to security.ca_cert or to the chain in security.server_cert"
            )
        if point := distribution_point(each):
            warnings.append(
                f"{its} is only for certificates that name the distribution point {point}, and "
                "all others of that CA are refused; get a list without the extension "
                "issuingDistributionPoint if that is not wanted"
            )
    return tuple(warnings)


def _fault(
    found: x509.CertificateRevocationList, known: list[x509.Certificate], now: datetime
) -> str | None:
    named = [each for each in known if each.subject == found.issuer]
    if named and not any(found.is_signature_valid(each.public_key()) for each in named):  # type: ignore[arg-type]
        return "its signature is not the CA's"
    if isinstance(found.signature_hash_algorithm, _WEAK):
        return f"its signature is too weak ({found.signature_hash_algorithm.name})"
    if fault := scope_fault(found):
        return fault
    if found.last_update_utc > now:
        return f"it is not valid before {found.last_update_utc.isoformat()}; check the clock"
    end = found.next_update_utc
    if end is None:
        return "it has no end of validity (nextUpdate)"
    return f"it expired at {end.isoformat()}" if end <= now else None


def _unusable(file: PemFile, why: str) -> errors.CredentialsUnusable:
    return errors.CredentialsUnusable(
        f"cannot use the revocation list {file.path}: {why}", remedy=CRL_REMEDY
    )


@frozen
class Verifier:
    """Checks the certificates of connected clients."""

    _store: crypto.X509Store

    @classmethod
    def of(cls, files: ServerFiles, now: datetime) -> "Verifier":
        """Make a verifier with the CAs and the lists in `files`. Raises `CredentialsUnusable`."""
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
        """Return why a client's certificate is no longer valid, in words; None if it is valid.

        `chain` has the certificates that the client has presented, in DER, its own first.
        """
        try:
            peer, *between = (crypto.load_certificate(crypto.FILETYPE_ASN1, der) for der in chain)
            crypto.X509StoreContext(self._store, peer, between).verify_certificate()
        except (ValueError, crypto.Error):  # ValueError for an empty chain
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
