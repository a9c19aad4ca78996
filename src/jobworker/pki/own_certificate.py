"""Why a server may have refused our certificate, found out by looking at it ourselves.

TLS has one alert, bad_certificate, for one that is not valid yet, that is too weak, or that is
damaged (RFC 8446, section 6.2). Which of these it is, the client's own file tells. This is looked
up only after a refusal: it imports cryptography, which would double a client's start.
"""

from datetime import UTC, datetime
from pathlib import Path

from jobworker.errors import CertificateRefused, JobworkerError
from jobworker.pki.refusals import AMBIGUOUS

LEAST_RSA_BITS = 2048


def told_precisely(refused: JobworkerError, certificate: Path) -> JobworkerError:
    """The same refusal, with the cause that our own certificate shows, if it shows one."""
    if refused.data.get("alert") != AMBIGUOUS:
        return refused
    cause = _cause(certificate, datetime.now(UTC))
    if cause is None:
        return refused
    return CertificateRefused(
        f"cannot connect: the server refused this client: this client's certificate {cause}",
        remedy=refused.remedy,
        data=refused.data,
    )


def _cause(certificate: Path, now: datetime) -> str | None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import rsa

    try:
        own = x509.load_pem_x509_certificate(certificate.read_bytes())
        key, digest = own.public_key(), own.signature_hash_algorithm
    except (OSError, ValueError):
        return None
    if own.not_valid_before_utc > now:
        return (
            f"is not valid yet: it begins at {own.not_valid_before_utc.isoformat()}, "
            f"and here it is {now.isoformat(timespec='seconds')}"
        )
    if isinstance(key, rsa.RSAPublicKey) and key.key_size < LEAST_RSA_BITS:
        return f"is too weak: its RSA key has {key.key_size} bits, {LEAST_RSA_BITS} are asked for"
    if isinstance(digest, hashes.SHA1 | hashes.MD5):
        return f"is too weak: it is signed by {digest.name}"
    return None
