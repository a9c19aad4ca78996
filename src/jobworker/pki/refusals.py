"""Turn a failed TLS handshake into an error message, on either side.

In TLS 1.3 a client's handshake is over before the server has seen its certificate: a refusal
arrives as an alert at the first read after it. So a client calls `client_refusal` for an error of
either.

Each error becomes one line that names the cause and, for the client, a remedy. The owner of the
stream passes in the exception: this module has no sockets and no event loop. It does not import
cryptography or pyOpenSSL either, because a client imports it at every start.
"""

import re
import ssl

from jobworker import errors

# X509_V_ERR_* of openssl/x509_vfy.h, openssl-verification-options(1)
EXPIRED, NOT_YET_VALID, _REVOKED, _WRONG_PURPOSE = 10, 9, 23, 26
_HOSTNAME_MISMATCH, _IP_ADDRESS_MISMATCH = 62, 64
_WRONG_NAME = frozenset({_HOSTNAME_MISMATCH, _IP_ADDRESS_MISMATCH})
_BAD_SIGNATURE, _SELF_SIGNED_LEAF, _SELF_SIGNED_IN_CHAIN = 7, 18, 19
_NO_ISSUER_AT_HAND, _LEAF_NOT_VERIFIED = 20, 21
FOREIGN = frozenset(
    {
        _BAD_SIGNATURE,
        _SELF_SIGNED_LEAF,
        _SELF_SIGNED_IN_CHAIN,
        _NO_ISSUER_AT_HAND,
        _LEAF_NOT_VERIFIED,
    }
)
"""Error codes of a certificate that the expected CA has not issued."""

# RFC 8446, section 6.2. OpenSSL answers a certificate that is not valid yet or too weak with
# bad_certificate, an outdated revocation list with certificate_expired, and with TLS 1.2 a
# certificate that is missing with handshake_failure.
_ALERTS = {
    "CERTIFICATE_REQUIRED": "it asks for a client certificate and got none",
    "UNKNOWN_CA": "this client's certificate is not from the server's CA",
    "BAD_CERTIFICATE": "this client's certificate is not valid yet, is too weak, or is damaged",
    "CERTIFICATE_EXPIRED": "this client's certificate (or the server's revocation list) has "
    "expired",
    "CERTIFICATE_REVOKED": "this client's certificate has been revoked",
    "UNSUPPORTED_CERTIFICATE": "this client's certificate is not made for clients",
    "CERTIFICATE_UNKNOWN": "this client's certificate did not pass its checks",
    "DECRYPT_ERROR": "this client's certificate has a wrong signature",
    "RECORD_OVERFLOW": "this client's certificates are too long; its file needs its own one and "
    "those of the CAs between it and the server's CA, 16 KB together",
    "ACCESS_DENIED": "this client's certificate gives no access",
    "HANDSHAKE_FAILURE": "client and server have no common TLS parameters, or it got no "
    "certificate",
}

AMBIGUOUS = "bad_certificate"
"""The alert that has several causes; `own_certificate` finds out which one it is."""

_NOT_TLS = {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG"}

_SERVER_SIDE = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "the client sent no certificate",
    "HTTP_REQUEST": "the client spoke plain HTTP",
    "UNSUPPORTED_PROTOCOL": "the client offers no TLS version that is allowed here",
    "NO_SHARED_CIPHER": "the client offers no cipher that is allowed here",
    "UNEXPECTED_EOF_WHILE_READING": "the client closed the connection",
} | dict.fromkeys(_NOT_TLS, "the client did not speak TLS")


def client_refusal(error: ssl.SSLError) -> errors.JobworkerError:
    """Map the exception of a client's handshake, or of its first read, to an error for its user.

    `ServerUntrusted`: the client refused the server. `CertificateRefused`: the server refused the
    client, by an alert. `ConnectionFailed`: the handshake failed for another reason.
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        return _untrusted(error)
    alert = _alert(error)
    if alert in _ALERTS:
        remedy = (
            "check this client's certificate and key (for worker-cli: --cert and --key), or ask "
            "the administrator for a new certificate"
        )
        if alert in ("CERTIFICATE_EXPIRED", "BAD_CERTIFICATE"):
            remedy += "; the clocks of both machines must be right"
        return errors.CertificateRefused(
            f"cannot connect: the server refused this client: {_ALERTS[alert]}",
            remedy=remedy,
            data={"alert": alert.lower()},
        )
    reason = _reason(error)
    remedy = (
        "check that a jobworker service has this address (for worker-cli: --server or "
        "WORKER_SERVER), and read its log"
    )
    cls = errors.ConnectionFailed
    if alert == "PROTOCOL_VERSION" or reason == "UNSUPPORTED_PROTOCOL":
        why = "the server does not offer TLS 1.3"
    elif alert:
        why = f"the server ended the handshake (TLS alert: {words(alert)})"
    elif reason in _NOT_TLS:
        why, cls = "the server does not speak TLS at this address", errors.NoService
    elif isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        why = "the server closed the connection during the TLS handshake"
    else:
        why = f"TLS failed ({words(reason) or error})"
    return cls(f"cannot connect: {why}", remedy=remedy)


def explain_server_side(error: ssl.SSLError) -> str:
    """Return one clause, for the log, about why a server's handshake with a client failed."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the client's certificate was refused: {error.verify_message}"
    if alert := _alert(error):
        return f"the client refused this server (TLS alert: {words(alert)})"
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return "the client closed the connection"
    reason = _reason(error)
    return _SERVER_SIDE.get(reason, f"the TLS handshake failed: {words(reason) or error}")


def _untrusted(error: ssl.SSLCertVerificationError) -> errors.ServerUntrusted:
    code = error.verify_code
    renew = "ask the administrator to renew it; check this machine's clock as well"
    if code in _WRONG_NAME:
        # OpenSSL's message has the name that was dialled: "certificate is not valid for 'x'"
        why = f"its certificate is for another name ({error.verify_message.rstrip('.')})"
        remedy = (
            "use a name that is in the certificate, or add one on the host of its CA's key: "
            "worker certs renew server --host NAME --dir DIR, and reload the service"
        )
    elif code in FOREIGN:
        why = f"its certificate is not from this client's CA ({error.verify_message})"
        remedy = (
            "copy ca-cert.pem from the server (for worker-cli: --ca); if it was the right file, an "
            "attacker may be between client and server"
        )
    elif code == EXPIRED:
        why, remedy = "its certificate, or the CA's, has expired", renew
    elif code == NOT_YET_VALID:
        why, remedy = "its certificate, or the CA's, is not valid yet", renew
    elif code == _REVOKED:
        why, remedy = "its certificate has been revoked", "ask the administrator for a new one"
    elif code == _WRONG_PURPOSE:
        why = "its certificate is not made for servers"
        remedy = "configure server-cert.pem and server-key.pem on the server"
    else:
        why, remedy = f"its certificate fails ({error.verify_message})", renew
    return errors.ServerUntrusted(f"cannot trust the server: {why}", remedy=remedy)


def _alert(error: ssl.SSLError) -> str:
    """Return the alert's name of RFC 8446, in capitals; "" if the peer sent none.

    OpenSSL prefixes the name by the TLS version that introduced the alert, whatever version was
    used. If Python's table does not have the reason, the name is in the text of the error.
    """
    text = (_reason(error) or str(error)).upper().replace(" ", "_")
    found = re.search(r"ALERT_([A-Z_]+?)(?=_?\(|$)", text)
    return found[1] if found else ""


def _reason(error: ssl.SSLError) -> str:
    # Only errors from OpenSSL's queue have it; None if Python's table does not have the reason.
    return getattr(error, "reason", None) or ""


def words(reason: str) -> str:
    """Format an alert or a reason of OpenSSL, NAMED_LIKE_THIS, as lower-case words."""
    return reason.lower().replace("_", " ")
