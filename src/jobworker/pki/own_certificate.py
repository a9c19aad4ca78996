"""Find out why a server has refused the client's certificate, by reading that certificate.

TLS has one alert, bad_certificate, for a certificate that is not valid yet, is too weak, or is
damaged (RFC 8446, section 6.2), and none for a server whose clock is wrong. The client's own file
and clock distinguish these causes. The client does this only after a refusal, because it imports
cryptography, which would double a client's start time.
"""

from datetime import UTC, datetime
from pathlib import Path

from jobworker.errors import CertificateRefused, JobworkerError
from jobworker.pki.credentials import PEM_BYTES_MAX
from jobworker.pki.refusals import AMBIGUOUS
from jobworker.regular_file import read_regular

EXPIRED_ALERT = "certificate_expired"
LEAST_RSA_BITS = 2048


def with_cause(refused: JobworkerError, certificate: Path) -> JobworkerError:
    """Return the refusal with the cause that the client's certificate shows, if there is one."""
    alert = refused.data.get("alert")
    if alert not in (AMBIGUOUS, EXPIRED_ALERT):
        return refused
    cause = _cause(certificate, datetime.now(UTC), expired=alert == EXPIRED_ALERT)
    if cause is None:
        return refused
    return CertificateRefused(
        f"cannot connect: the server refused this client: this client's certificate {cause}",
        remedy=refused.remedy,
        data=refused.data,
    )


def _cause(certificate: Path, now: datetime, *, expired: bool) -> str | None:
    from cryptography import x509

    from jobworker.pki.unreadable import UNREADABLE

    try:
        own = x509.load_pem_x509_certificate(read_regular(certificate, PEM_BYTES_MAX))
        key, digest = own.public_key(), own.signature_hash_algorithm
    except (OSError, *UNREADABLE):
        return None
    here = f"here it is {now.isoformat(timespec='seconds')}"
    begins, ends = own.not_valid_before_utc.isoformat(), own.not_valid_after_utc.isoformat()
    if expired and own.not_valid_after_utc <= now:
        return f"has expired: it ended at {ends}, and {here}"
    if expired:
        return (
            f"has expired by the server's clock, or the server's revocation list has: the "
            f"certificate ends at {ends}, and {here}; the server's clock may be ahead"
        )
    weakness = _weakness(key, digest)
    if own.not_valid_before_utc > now:
        return f"is not valid yet: it begins at {begins}, and {here}"
    return weakness or (
        f"is not valid yet by the server's clock: it begins at {begins}, and {here}; the server's "
        "clock may be behind (or the certificate is damaged for the server: see the server's log)"
    )


def _weakness(key: object, digest: object) -> str | None:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import rsa

    if isinstance(key, rsa.RSAPublicKey) and key.key_size < LEAST_RSA_BITS:
        return f"is too weak: its RSA key has {key.key_size} bits, {LEAST_RSA_BITS} are required"
    if isinstance(digest, hashes.SHA1 | hashes.MD5):
        return f"is too weak: it is signed by {digest.name}"
    return None
