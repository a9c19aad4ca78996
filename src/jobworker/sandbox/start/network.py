"""The job's network, as far as the process that becomes the job has a hand in it.

    host     the host's own: a root without rights over it can use and not configure it
    none     a namespace with a loopback, and nothing else
    private  one with a way out, which `sandbox.network.slirp` makes

A network namespace belongs to the user namespace that makes it (network_namespaces(7)). A job's is
made before the job's own user namespace is entered, so whatever the job is root of, this is not:
no capability of it reaches the interfaces, routes and settings of even its own network.

Settings below /proc/sys/net are each namespace's own. They are changed while a /proc is at hand
that may be written to. Every port may be listened at, as there is no one else there to take it
from, and a job may ping. In a private network only the loopback has IPv6, as the wall lets none of
it through.

Standard library only.
"""

import contextlib
import fcntl
import os
import socket
import struct

from jobworker.sandbox import syscalls as sc

_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1
_STAGE = "/run/.jobworker"
"""A place to mount for a moment: /run is the job's own and empty."""
_PORTS = "/proc/sys/net/ipv4/ip_unprivileged_port_start"
_PINGS = "/proc/sys/net/ipv4/ping_group_range"
"""Of IPv6 as well. A new network lets no group send any."""
_WITHOUT_IPV6 = "/proc/sys/net/ipv6/conf/default/disable_ipv6"


def unshare_network(groups: range) -> None:
    """Enter a network namespace of one's own, with its loopback up; see `allow` for `groups`."""
    sc.unshare(sc.CLONE_NEWNET)
    bring_up("lo")
    allow(groups)


def allow(groups: range) -> None:
    """Let every port be listened at, low ones too (ip(7)), and `groups` send pings (icmp(7)).

    The groups are the job's, as this process's user namespace numbers them.
    """
    for path, text in ((_PORTS, "0"), (_PINGS, f"{groups[0]} {groups[-1]}")):
        with open(path, "w", encoding="ascii") as file:
            file.write(text)


def keep_to_ipv4() -> None:
    """Have interfaces that are made later do without IPv6: ip-sysctl.rst of the kernel."""
    # Bytes and no text: a gateway's root has no module for an encoding that is not loaded yet.
    with (
        contextlib.suppress(FileNotFoundError),  # a kernel without IPv6
        open(_WITHOUT_IPV6, "wb", buffering=0) as file,
    ):
        file.write(b"1")


def bring_up(interface: str) -> None:
    """Set an interface up: netdevice(7)."""
    request = struct.pack("16sH22x", interface.encode(), _IFF_UP)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        fcntl.ioctl(control, _SIOCSIFFLAGS, request)


def write_names(files: tuple[tuple[str, str], ...]) -> None:
    """Cover each file that exists by one with the given text, which the job cannot change."""
    os.mkdir(_STAGE, 0o700)
    flags = sc.MS_NOSUID | sc.MS_NODEV | sc.MS_NOEXEC
    sc.mount("tmpfs", _STAGE, "tmpfs", flags, "mode=755,size=64k")
    for number, (path, text) in enumerate(files):
        if os.path.exists(path):
            source = f"{_STAGE}/{number}"
            with open(source, "w", encoding="utf-8") as file:
                file.write(text)
            sc.mount(source, path, None, sc.MS_BIND)
    sc.umount(_STAGE)  # what is bound elsewhere keeps its file
    os.rmdir(_STAGE)
