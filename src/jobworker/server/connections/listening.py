"""The port of the service: sockets are bound first, and listen once the service is ready."""

import errno
import os
import socket
from collections.abc import Sequence

from jobworker.errors import AddressUnavailable

BACKLOG = 1024


def bind(address: str, port: int) -> tuple[socket.socket, ...]:
    """Sockets bound to each IP address of `address`, not listening yet.

    Raises AddressUnavailable.
    """
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise AddressUnavailable(
            f"cannot listen at {address!r}: {getattr(error, 'strerror', None) or error}",
            remedy="set server.address to an address of this host, such as 0.0.0.0",
        ) from None
    listeners: list[socket.socket] = []
    try:
        for family, kind, protocol, _, where in found:
            listener = socket.socket(family, kind, protocol)
            listeners.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:  # "::" alone stands for IPv4 too, whatever the host's
                both = where[0] == "::" and len(found) == 1  # own default is: ipv6(7)
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not both)
            listener.bind(where)
            listener.setblocking(False)
    except OSError as error:
        for listener in listeners:
            listener.close()
        raise _cannot_listen(f"{address}:{port}", error) from None
    return tuple(listeners)


def listen(listeners: Sequence[socket.socket]) -> None:
    """Listen on the bound sockets: clients can connect from now on. Raises AddressUnavailable."""
    for listener in listeners:
        try:
            listener.listen(BACKLOG)
        except OSError as error:  # another process has begun to listen there since the bind
            raise _cannot_listen(str(listener.getsockname()[:2]), error) from None


def _cannot_listen(where: str, error: OSError) -> AddressUnavailable:
    remedies = {
        errno.EADDRINUSE: "stop the program that listens there, or choose another server.port",
        errno.EADDRNOTAVAIL: "set server.address to an address of this host",
    }
    return AddressUnavailable(
        f"cannot listen at {where}: {os.strerror(error.errno or 0)}",
        remedy=remedies.get(error.errno or 0, "choose another server.address or server.port"),
    )
