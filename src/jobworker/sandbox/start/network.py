"""Sets up the job's side of its network, in the process that becomes the job.

    host     the host's own network: the job can use it, but has no rights to configure it
    none     a namespace with a loopback device and nothing else
    private  a namespace with a way out through a gateway, see `sandbox.network`

A network namespace belongs to the user namespace of the process that makes it
(network_namespaces(7)). The job's is made before its process enters the job's user namespace. So
the job's root has no rights over it, and cannot change the interfaces, routes and settings even of
its own network.

Each network namespace has its own settings below /proc/sys/net. They are set before the root is
assembled, since the job's own /proc/sys is read-only. The job may listen at every port, because
no other job shares its ports, and it may send pings. In a private network only the loopback has
IPv6, because the wall passes IPv4 alone.

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
"""A mount point for a moment. /run is a new tmpfs of the job, so the name is free."""
_PORTS = "/proc/sys/net/ipv4/ip_unprivileged_port_start"
_PINGS = "/proc/sys/net/ipv4/ping_group_range"
"""The groups that may send pings, of IPv6 as well. In a new namespace no group may."""
_WITHOUT_IPV6 = "/proc/sys/net/ipv6/conf/default/disable_ipv6"


def unshare_network(groups: range) -> None:
    """Move this process into a new network namespace with a loopback; see `allow` for `groups`."""
    sc.unshare(sc.CLONE_NEWNET)
    bring_up("lo")
    allow(groups)


def allow(groups: range) -> None:
    """Allow the job to listen at every port (ip(7)), and `groups` to send pings (icmp(7)).

    `groups` are the ids of the job's groups in this process's user namespace. Raises OSError.
    """
    for path, text in ((_PORTS, "0"), (_PINGS, f"{groups[0]} {groups[-1]}")):
        with open(path, "w", encoding="ascii") as file:
            file.write(text)


def keep_to_ipv4() -> None:
    """Disable IPv6 on interfaces that are made later: ip-sysctl.rst of the kernel."""
    # Bytes, not text: Python may have to import a codec, which is not in a gateway's root.
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
    """Replace `files`, as (path, text), by read-only mounts of files with these texts.

    A path that does not exist is left out.
    """
    os.mkdir(_STAGE, 0o700)
    flags = sc.MS_NOSUID | sc.MS_NODEV | sc.MS_NOEXEC
    sc.mount("tmpfs", _STAGE, "tmpfs", flags, "mode=755,size=64k")
    for number, (path, text) in enumerate(files):
        if os.path.exists(path):
            source = f"{_STAGE}/{number}"
            with open(source, "w", encoding="utf-8") as file:
                file.write(text)
            sc.mount(source, path, None, sc.MS_BIND)
    sc.umount(_STAGE)  # the bind mounts keep the file system
    os.rmdir(_STAGE)
