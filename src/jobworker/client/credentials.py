"""The client's three files, which are read again for each connection.

Certificates are renewed while clients run, so a client that dials makes its TLS context from the
current files. While the files are being replaced, they may not match for a moment. The client then
retries for `SETTLE_SECONDS`, and after that uses the last good context. It also uses that context
if it can no longer read the files, for example after it has changed its user. A thread reads them,
because a network file system may make it wait.
"""

import logging
import ssl
from pathlib import Path

import trio
from attrs import define, field

from jobworker.errors import CredentialsUnusable
from jobworker.pki.credentials import PEM_BYTES_MAX
from jobworker.pki.tls import client_context, key_mode_warning
from jobworker.regular_file import read_regular
from jobworker.threads import in_thread

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
        return self._keep(*self._current(self._context, self._content))

    def _current(
        self, context: ssl.SSLContext | None, content: tuple[bytes, ...]
    ) -> tuple[ssl.SSLContext, tuple[bytes, ...]]:
        """The context of the current files and their content; the given ones if nothing changed."""
        before = self._contents()
        while context is None or before != content:
            made = client_context(ca=self.ca, certificate=self.certificate, key=self.key)
            after = self._contents()
            if before == after:
                context, content = made, after
                if warning := key_mode_warning(self.key):
                    log.warning("%s", warning)
            before = after
        return context, content

    def _keep(self, context: ssl.SSLContext, content: tuple[bytes, ...]) -> ssl.SSLContext:
        self._context, self._content = context, content
        return context

    async def renewed(self) -> ssl.SSLContext:
        """Return the same, or the last good context if the files have become unusable.

        Raises CredentialsUnusable if there was no good context before.
        """
        ends = trio.current_time() + SETTLE_SECONDS
        while True:
            try:
                found = await in_thread(
                    self._current, self._context, self._content, abandon_on_cancel=True
                )
                return self._keep(*found)
            except CredentialsUnusable:
                if self._context is None:
                    raise
                if trio.current_time() >= ends:
                    return self._context
            await trio.sleep(_PAUSE_SECONDS)

    def _contents(self) -> tuple[bytes, ...]:
        try:
            files = (self.ca, self.certificate, self.key)
            return tuple(read_regular(path, PEM_BYTES_MAX) for path in files)
        except (OSError, ValueError):
            return ()  # `client_context` reports the error
