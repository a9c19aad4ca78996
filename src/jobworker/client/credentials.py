"""The client's three files, which are read again for each connection.

Certificates are renewed while clients run, so a client that dials makes its TLS context from the
current files. While the files are being replaced, they may not match for a moment. The client then
retries for `SETTLE_SECONDS`, and after that uses the last good context. It also uses that context
if it can no longer read the files, for example after it has changed its user.
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
    """The files, and the last TLS context that was made of them."""

    ca: Path = field(converter=_absolute)
    certificate: Path = field(converter=_absolute)
    key: Path = field(converter=_absolute)
    """All three are absolute: the working directory may change before they are read again."""
    _context: ssl.SSLContext | None = field(default=None, init=False, repr=False)
    _content: tuple[bytes, ...] = field(default=(), init=False, repr=False)

    def read(self) -> ssl.SSLContext:
        """Return the TLS context of the current files. Raises CredentialsUnusable."""
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
        """Return the same, or the last good context if the files have become unusable.

        Raises CredentialsUnusable if there was no good context before.
        """
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
            return ()  # `client_context` reports the error
