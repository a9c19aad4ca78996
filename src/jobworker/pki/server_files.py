"""A server's PEM files in memory: their bytes, and the paths that error messages name.

One process reads the files (root at the start, the reader later) and passes the bytes to the code
that makes a TLS context of them. So the checked bytes are the used ones, and a service that has
dropped root's rights can get new ones. OpenSSL reads chains and revocation lists from files only;
`placed` gives it descriptors of memory instead (memfd_create(2)), which are never on a disk and are
closed after the block. Error messages name the files' own paths.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from attrs import evolve, field, frozen

from jobworker.pki.credentials import RENEWAL, SERVER_REMEDY, PemFile, read_pem

CRL_REMEDY = (
    "get one from the CA (for your own CA: worker certs crl --dir DIR, on the host of its key), or "
    "set security.crl to '' for none"
)


@frozen(kw_only=True)
class ServerFiles:
    """The files from which a server's TLS context is made."""

    ca: PemFile
    certificate: PemFile
    key: PemFile = field(repr=False)
    crl: PemFile | None = None

    @classmethod
    def read(
        cls, *, ca: Path, certificate: Path, key: Path, crl: Path | None = None
    ) -> "ServerFiles":
        """Read the files. Raises `CredentialsUnusable`, which names the unusable file."""
        return cls(
            ca=_read(ca, "CA certificate", "CERTIFICATE", SERVER_REMEDY),
            certificate=_read(certificate, "server certificate", "CERTIFICATE", RENEWAL),
            key=_read(key, "server key", "PRIVATE KEY", RENEWAL),
            crl=None if crl is None else _read(crl, "revocation list", "X509 CRL", CRL_REMEDY),
        )

    @contextmanager
    def placed(self) -> Iterator["ServerFiles"]:
        """For the block, the same files in memory descriptors that OpenSSL can open (`at`)."""
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
    absent = f"name the right file in the configuration, or {remedy}"
    return read_pem(path, what, label, remedy, absent=absent)
