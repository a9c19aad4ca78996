"""The job's network, as far as the process that becomes the job has a hand in it.

    host     the host's own: a root without rights over it can use and not configure it
    none     a namespace with a loopback, and nothing else
    private  one with a way out, which `sandbox.private_network` makes

A network namespace belongs to the user namespace that makes it (network_namespaces(7)). A job's is
made before the job's own user namespace is entered, so whatever the job is root of, this is not:
no capability of it reaches the interfaces, routes and settings of even its own network.

Settings below /proc/sys/net are each namespace's own. One is changed while the launcher's /proc is
at hand: every port may be listened at, as there is no one else there to take it from.

Standard library only.
"""

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


def unshare_network() -> None:
    """Enter a network namespace of one's own, with its loopback up."""
    sc.unshare(sc.CLONE_NEWNET)
    bring_up("lo")
    open_ports()


def open_ports() -> None:
    """Let every port be listened at, low ones too: ip(7)."""
    with open(_PORTS, "w", encoding="ascii") as file:
        file.write("0")


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
