"""Who a certificate says its bearer is: one name and one role as they stand there, or a refusal.

An input is a certificate in DER. OpenSSL reads it as it reads a client's, so that a subject of any
shape comes to `identity` as it would from the network.
"""

import base64
import os
import ssl
import sys

try:
    import atheris
except ImportError:  # the seeds and their mutations run without it, see tests/unit/test_fuzz.py
    atheris = None

if atheris is not None:
    with atheris.instrument_imports():
        from jobworker.errors import PermissionDenied
        from jobworker.pki.identity import identity, name_fault
else:
    from jobworker.errors import PermissionDenied
    from jobworker.pki.identity import identity, name_fault


def one(data: bytes) -> None:
    """Try one input; raises what must never be raised."""
    text = base64.encodebytes(data)
    pem = b"-----BEGIN CERTIFICATE-----\n" + text + b"-----END CERTIFICATE-----\n"
    memory = os.memfd_create("fuzz", os.MFD_CLOEXEC)
    try:
        os.write(memory, pem)
        decoded = ssl._ssl._test_decode_cert(f"/proc/self/fd/{memory}")
    except (ssl.SSLError, ValueError, UnicodeDecodeError):
        return  # no certificate: the handshake would have failed
    finally:
        os.close(memory)
    try:
        who = identity(decoded)
    except PermissionDenied:
        return
    names = [value for relative in decoded["subject"] for _, value in relative]
    assert who.role in names
    assert who.common_name in names
    assert name_fault(who.role) is None
    assert name_fault(who.common_name) is None


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
