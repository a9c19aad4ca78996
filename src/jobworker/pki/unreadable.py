"""The exceptions of `cryptography` for a certificate or a revocation list that it cannot read.

Most of them are ValueError, but not all: OpenSSL takes certificates, in a handshake or from a file,
that `cryptography` refuses by exceptions of its own. Some of these come only when a part is asked
for, such as the extensions. Code that reads a certificate catches all of them.
"""

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm

UNREADABLE = (
    ValueError,
    UnsupportedAlgorithm,  # of the key or the signature
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,  # an x400Address or ediPartyName of RFC 5280, 4.2.1.6
)
