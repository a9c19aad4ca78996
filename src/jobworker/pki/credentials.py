"""Read certificate, key and CA files, load them into a TLS context, and check them before use.

Each error names the file, what is wrong with it and the remedy. A server's own certificate is
checked by the rules that its clients will apply, with the X509Store of pyOpenSSL, which reports the
cause. Only this check imports cryptography and OpenSSL, which would double a client's start time.
"""

import re
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import Factory, field, frozen

from jobworker import errors
from jobworker.pki.refusals import EXPIRED, FOREIGN, NOT_YET_VALID, words
from jobworker.regular_file import read_regular

if TYPE_CHECKING:
    from cryptography import x509


SERVER_REMEDY = "make a set with 'worker certs init --dir DIR' and name it in the configuration"
"""For an unusable CA file: without the CA, the clients' certificates are of no use either."""
RENEWAL = (
    "get the server a new certificate and key from the same CA, so that its clients still work: "
    "from whoever runs the CA, or for a CA of 'worker certs' by 'worker certs renew server --dir "
    "DIR' (--host NAME for another name)"
)
PEM_BYTES_MAX = 1024 * 1024  # far larger than any chain; a wrong path may name a disk image


@frozen
class PemFile:
    """A PEM file that was read."""

    path: Path
    """The path that error messages name."""
    content: bytes = field(repr=False)
    at: Path = field(default=Factory(lambda self: self.path, takes_self=True), repr=False)
    """The path from which OpenSSL reads it."""


class _Encrypted(Exception):
    """OpenSSL asked for a passphrase."""


def read_pem(path: Path, what: str, label: str, remedy: str, *, absent: str = "") -> PemFile:
    """Read a PEM file of at most `PEM_BYTES_MAX`, with `label` in one of its BEGIN lines.

    `what` names the kind of file in errors. `absent` is the remedy for a missing file, if it
    differs from `remedy`. Raises `CredentialsUnusable`.
    """
    try:
        content = read_regular(path, PEM_BYTES_MAX)
    except FileNotFoundError:
        raise _unusable(path, what, "there is no such file", absent or remedy) from None
    except PermissionError:
        who = "this user" if label == "CERTIFICATE" else "this user (and nobody else)"
        allow = f"let {who} read {path}"
        raise _unusable(path, what, "this user may not read it", allow) from None
    except OSError as exc:
        raise _unusable(path, what, exc.strerror or str(exc), remedy) from None
    except ValueError:  # a NUL or a lone surrogate in the path
        raise _unusable(path, what, "no file can have that path", remedy) from None
    if not re.search(rb"-----BEGIN (?:[A-Z0-9]+ )*" + label.encode() + b"-----", content):
        raise _unusable(path, what, f"it holds no PEM block '{label}'", remedy)
    return PemFile(path, content)


def load(
    context: ssl.SSLContext,
    side: str,
    remedy: str,
    *,
    ca: PemFile,
    certificate: PemFile,
    key: PemFile,
    pair_remedy: str = "",
) -> None:
    """Load the three files into `context`; errors name its `side` ("server", "client").

    `pair_remedy` is the remedy for certificate and key, if it differs from the CA's. An encrypted
    key is refused: there is no prompt. Raises `CredentialsUnusable`.
    """
    try:
        context.load_verify_locations(cafile=ca.at)
    except ssl.SSLError as exc:
        raise _unusable(
            ca.path, "CA certificate", f"it is damaged ({_reason(exc)})", remedy
        ) from None

    def passphrase() -> str:
        raise _Encrypted  # without this, OpenSSL would prompt at the terminal

    try:
        context.load_cert_chain(certificate.at, key.at, password=passphrase)
    except _Encrypted:
        decrypt = f"decrypt it: openssl pkey -in {key.path} -out NEW"
        raise _unusable(key.path, f"{side} key", "it is encrypted", decrypt) from None
    except ssl.SSLError as exc:
        raise _pair_fault(
            exc, side, pair_remedy or remedy, certificate=certificate, key=key
        ) from None


def _pair_fault(
    error: ssl.SSLError, side: str, remedy: str, *, certificate: PemFile, key: PemFile
) -> errors.CredentialsUnusable:
    """Find out which of the two files OpenSSL has refused."""
    # OpenSSL keeps a key of another type in another slot, which has no certificate.
    if error.reason in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED"):
        if _belongs_to_a_later_one(certificate, key):
            alien = f"it does not belong to the first certificate of {certificate.path}"
            remedy = "put the key's own certificate first there, and those of its CAs after it"
        else:
            alien = f"it does not belong to {certificate.path}"
        return _unusable(key.path, f"{side} key", alien, remedy)
    if error.reason in ("EE_KEY_TOO_SMALL", "CA_KEY_TOO_SMALL", "CA_MD_TOO_WEAK"):
        weak = f"OpenSSL considers it too weak ({words(error.reason)})"
        return _unusable(certificate.path, f"{side} certificate", weak, remedy)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=certificate.at)
    except ssl.SSLError as exc:
        damaged = f"it is damaged ({_reason(exc)})"
        return _unusable(certificate.path, f"{side} certificate", damaged, remedy)
    return _unusable(key.path, f"{side} key", f"it is damaged ({_reason(error)})", remedy)


def _belongs_to_a_later_one(certificate: PemFile, key: PemFile) -> bool:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    from jobworker.pki.unreadable import UNREADABLE

    try:
        own = load_pem_private_key(key.content, None).public_key()
        later = x509.load_pem_x509_certificates(certificate.content)[1:]
        return any(each.public_key() == own for each in later)
    except (*UNREADABLE, TypeError):  # unreadable or encrypted, so unknown
        return False


def _reason(error: ssl.SSLError) -> str:
    return error.reason or "OpenSSL cannot decode it"  # None if Python's table lacks the reason


def _unusable(path: Path, what: str, why: str, remedy: str) -> errors.CredentialsUnusable:
    return errors.CredentialsUnusable(f"cannot use the {what} {path}: {why}", remedy=remedy)


def read_certificates(file: PemFile, what: str, remedy: str) -> "list[x509.Certificate]":
    """Read all certificates of a file; their names can be read. Raises `CredentialsUnusable`."""
    from cryptography import x509

    from jobworker.pki.unreadable import UNREADABLE

    try:
        found = x509.load_pem_x509_certificates(file.content)
        _check_names(found)
    except UNREADABLE as exc:
        raise _unusable(file.path, what, f"it is damaged ({exc})", remedy) from None
    return found


def check_authorities(ca: PemFile) -> None:
    """Check that a CA file contains CA certificates only, because each one is a trust anchor.

    Raises `CredentialsUnusable`.
    """
    from cryptography import x509

    from jobworker.pki.unreadable import UNREADABLE

    what = "CA certificate"
    found = read_certificates(ca, what, SERVER_REMEDY)
    try:
        constraints = [
            (each, extension.value.ca)
            for each in found
            for extension in each.extensions
            if isinstance(extension.value, x509.BasicConstraints)
        ]
    except UNREADABLE as exc:
        raise _unusable(ca.path, what, f"it is damaged ({exc})", SERVER_REMEDY) from None
    authorities = [each for each, is_ca in constraints if is_ca]
    for each in found:
        if each not in authorities:
            name = each.subject.rfc4514_string()
            raise _unusable(
                ca.path,
                what,
                f"{name} in it is not a CA (no CA:TRUE in its basic constraints), and the holder "
                "of its key would be trusted",
                "leave only CA certificates in that file",
            )


def _check_names(found: "Sequence[x509.Certificate]") -> None:
    """Raise ValueError if a name in a certificate cannot be read.

    OpenSSL takes names that `cryptography` refuses only when they are asked for, such as an
    IA5String that is not ASCII. Nothing after this check has to expect that.
    """
    for each in found:
        each.subject.rfc4514_string()
        each.issuer.rfc4514_string()


def check_server_certificate(ca: PemFile, certificate: PemFile) -> None:
    """Check a server's chain, validity and purpose as its clients will (RFC 5280, strict).

    `certificate` may contain intermediate certificates after the server's own. It must have at
    least one host name; the names are not compared with anything. Raises `CredentialsUnusable`.
    """
    from cryptography import x509
    from OpenSSL import crypto

    from jobworker.pki.unreadable import UNREADABLE

    store = crypto.X509Store()
    store.set_flags(crypto.X509StoreFlags.X509_STRICT | crypto.X509StoreFlags.PARTIAL_CHAIN)
    what = "server certificate"
    try:
        anchors = x509.load_pem_x509_certificates(ca.content)
        for anchor in anchors:
            store.add_cert(crypto.X509.from_cryptography(anchor))
        leaf, *others = x509.load_pem_x509_certificates(certificate.content)
        _check_names([leaf, *others])
        unusable = _server_use_fault(leaf)
        between = [crypto.X509.from_cryptography(other) for other in others]
        own = crypto.X509.from_cryptography(leaf)
    except (*UNREADABLE, crypto.Error) as exc:
        both = f"it or {ca.path} is damaged ({exc})"
        raise _unusable(certificate.path, what, both, RENEWAL) from None
    try:
        crypto.X509StoreContext(store, own, between).verify_certificate()
    except crypto.X509StoreContextError as exc:
        try:
            culprit = exc.certificate.to_cryptography()
        except crypto.Error:  # OpenSSL names none if it cannot read a key
            culprit = leaf
        owner = ca.path if culprit in anchors else certificate.path
        code, _, text = exc.errors
        raise _chain_fault(int(code), str(text), culprit, owner, ca.path) from None
    if unusable:
        raise _unusable(certificate.path, what, unusable, RENEWAL)


def _server_use_fault(leaf: "x509.Certificate") -> str | None:
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    present = {type(extension.value): extension.value for extension in leaf.extensions}
    extended = present.get(x509.ExtendedKeyUsage)
    if isinstance(extended, x509.ExtendedKeyUsage) and (
        ExtendedKeyUsageOID.SERVER_AUTH not in extended
    ):
        return "it is not made for servers (no serverAuth in its extended key usage)"
    usage = present.get(x509.KeyUsage)
    if isinstance(usage, x509.KeyUsage) and not usage.digital_signature:
        return "its key may not sign (no digitalSignature in its key usage)"
    if x509.SubjectAlternativeName not in present:
        return "it has no host name (no subject alternative name), so no client can check it"
    return None


def _chain_fault(
    code: int, text: str, culprit: "x509.Certificate", owner: Path, ca: Path
) -> errors.CredentialsUnusable:
    """Make the error for an X509_V_ERR_* code about `culprit`, a certificate in file `owner`."""
    what = "CA certificate" if owner == ca else "server certificate"
    if code in FOREIGN:
        why = f"it is not from the CA in {ca} ({text})"
    elif code == EXPIRED:
        why = f"it expired at {culprit.not_valid_after_utc.isoformat()}"
    elif code == NOT_YET_VALID:
        why = f"it is not valid before {culprit.not_valid_before_utc.isoformat()}; check the clock"
    else:
        why = text
    subject = culprit.subject.rfc4514_string()
    remedy = SERVER_REMEDY if owner == ca else RENEWAL
    return _unusable(owner, what, f"{why} [{subject}]", remedy)
