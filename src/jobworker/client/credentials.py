"""The client's three files, read anew for each connection.

Certificates are renewed while clients run. A client that dials makes its TLS context of the files
as they are then. Files that are being replaced may not fit each other for a moment: they are given
`SETTLE_SECONDS`, and then the last context that was good is used, as it is where the files cannot
be read any more (a process that gave its rights up, say).
"""

import logging
import ssl
from pathlib import Path

import trio
from attrs import define, field

from jobworker.errors import CredentialsUnusable
from jobworker.pki.tls import client_context, key_mode_warning

log = logging.getLogger("jobworker.client")

SETTLE_SECONDS = 1.0
_PAUSE_SECONDS = 0.1


def _absolute(path: Path) -> Path:
    return path.absolute()


@define(eq=False)
class Credentials:
    """The files, and the TLS context that was made of them last."""

    ca: Path = field(converter=_absolute)
    certificate: Path = field(converter=_absolute)
    key: Path = field(converter=_absolute)
    """All of them absolute: the working directory may change before they are read again."""
    _context: ssl.SSLContext | None = field(default=None, init=False, repr=False)
    _content: tuple[bytes, ...] = field(default=(), init=False, repr=False)

    def read(self) -> ssl.SSLContext:
        """The context of the files as they are now. Raises CredentialsUnusable."""
        before = self._contents()
        while self._context is None or before != self._content:
            context = client_context(ca=self.ca, certificate=self.certificate, key=self.key)
            after = self._contents()
            if before == after:
                self._context, self._content = context, after
                if warning := key_mode_warning(self.key):
                    log.warning("%s", warning)
            before = after
        return self._context

    async def renewed(self) -> ssl.SSLContext:
        """The same; of files that are unusable now but once were not, the last good context."""
        ends = trio.current_time() + SETTLE_SECONDS
        while True:
            try:
                return self.read()
            except CredentialsUnusable:
                if self._context is None:
                    raise
                if trio.current_time() >= ends:
                    return self._context
            await trio.sleep(_PAUSE_SECONDS)

    def _contents(self) -> tuple[bytes, ...]:
        try:
            return tuple(path.read_bytes() for path in (self.ca, self.certificate, self.key))
        except (OSError, ValueError):
            return ()  # whoever loads them names the fault
