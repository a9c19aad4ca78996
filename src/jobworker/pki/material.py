"""A server's PEM files as they are read: bytes, and the paths by which people know them.

Whoever may read the files (root, at start; the reader, later) hands them on to whoever makes a
context of them, so that what was judged is what is used, and a service that has given root up can
have new ones. OpenSSL takes chains and revocation lists from files only; `placed` gives it
descriptors of memory in their stead (memfd_create(2)), which never touch a disk and are gone after
the block. Faults name the files' own paths.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from attrs import evolve, field, frozen

from jobworker.pki.credentials import RENEWAL, SERVER_REMEDY, PemFile, read_pem

CRL_REMEDY = (
    "get one from the CA (of one's own: worker certs crl --dir DIR, where its key is), or set "
    "security.crl to '' to do without"
)


@frozen(kw_only=True)
class ServerFiles:
    """What a server's context is made of."""

    ca: PemFile
    certificate: PemFile
    key: PemFile = field(repr=False)
    crl: PemFile | None = None

    @classmethod
    def read(
        cls, *, ca: Path, certificate: Path, key: Path, crl: Path | None = None
    ) -> "ServerFiles":
        """Read the files. Raises `CredentialsUnusable` that names the one which is unusable."""
        return cls(
            ca=_read(ca, "CA certificate", "CERTIFICATE", SERVER_REMEDY),
            certificate=_read(certificate, "server certificate", "CERTIFICATE", RENEWAL),
            key=_read(key, "server key", "PRIVATE KEY", RENEWAL),
            crl=None if crl is None else _read(crl, "revocation list", "X509 CRL", CRL_REMEDY),
        )

    @contextmanager
    def placed(self) -> Iterator["ServerFiles"]:
        """The same files with their content where OpenSSL can read it."""
        with ExitStack() as stack:

            def place(file: PemFile) -> PemFile:
                descriptor = os.memfd_create("pem", os.MFD_CLOEXEC)
                stack.callback(os.close, descriptor)
                os.write(descriptor, file.content)
                return evolve(file, at=Path(f"/proc/self/fd/{descriptor}"))

            yield ServerFiles(
                ca=place(self.ca),
                certificate=place(self.certificate),
                key=place(self.key),
                crl=None if self.crl is None else place(self.crl),
            )


def _read(path: Path, what: str, label: str, remedy: str) -> PemFile:
    absent = f"name the file that is meant in the configuration, or {remedy}"
    return read_pem(path, what, label, remedy, absent=absent)
