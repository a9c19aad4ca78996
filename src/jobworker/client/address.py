"""Parse the address of a server: HOST, HOST:PORT, [IPv6] or [IPv6]:PORT.

An IPv6 address with a port needs brackets (RFC 3986, section 3.2.2). Without a port it needs none,
because no other form has two colons.
"""

import socket

from attrs import field, frozen
from attrs.validators import max_len

from jobworker.errors import shortened

DEFAULT_PORT = 50051
LONGEST = 1024
"""Characters of an address: far more than a name of the DNS, or an IPv6 address with its zone."""


@frozen
class Address:
    """A host, by name or by IP address (without brackets), and a TCP port."""

    host: str = field(validator=max_len(LONGEST))
    port: int = DEFAULT_PORT

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def server_name(self) -> str:
        """The name that must be in the server's certificate: the host without an IPv6 zone."""
        return self.host.partition("%")[0]


def parse_address(text: str) -> Address:
    """Parse an address; without a port in `text`, the port is 50051.

    Raises ValueError, which says what is wrong.
    """
    if len(text) > LONGEST:
        raise ValueError(f"{shortened(text)!r} is too long: it has {len(text)} characters")
    scheme, separator, rest = text.partition("://")
    if separator:
        form = rest.partition("/")[0] or "HOST:PORT"
        raise ValueError(f"{text!r} is a URL: write {form}, without {scheme}://")
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or not _is_ipv6(host) or (rest and not rest.startswith(":")):
            raise ValueError(f"{text!r} is not an address such as [::1]:{DEFAULT_PORT}")
        port = rest[1:] if rest else str(DEFAULT_PORT)
    elif text.count(":") > 1:
        host, port = text, str(DEFAULT_PORT)
        if not _is_ipv6(host):
            before, _, last = text.rpartition(":")
            form = f"[{before}]:{last}" if _is_ipv6(before) else f"HOST:PORT or [::1]:{port}"
            raise ValueError(f"{text!r} is not an IPv6 address: with a port, write {form}")
    else:
        host, colon, port = text.partition(":")
        port = port if colon else str(DEFAULT_PORT)
    if not host or host.startswith((".", "-")) or not host.isprintable() or set(host) & set(" /@"):
        raise ValueError(f"{text!r} is not HOST:PORT")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 1 <= int(port) <= 65535):
        raise ValueError(f"{text!r} names the port {port!r}; it must be from 1 to 65535")
    return Address(host, int(port))


def _is_ipv6(host: str) -> bool:
    try:
        socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
    except (OSError, ValueError):
        return False
    return True
