"""The addresses of a private network, and the program slirp4netns that connects it to the host's.

The job's packets go to slirp4netns, which has a TCP/IP stack in user space and opens ordinary
sockets on the host. So jobworker needs no bridge, no address and no firewall rule on the host, and
no connection from outside reaches the job.

    gateway (`network.gateway`) ──► the network namespace, and a pipe that signals when it is up
        ──► the job's process enters, waits and builds the wall (`start.private_network`)

What must hold: the network belongs to the gateway's user namespace, not to the job's, so the job
cannot configure it. The wall (`sandbox.start.wall`) drops every packet to an address that the job
may not reach, before slirp4netns can read it. These are all addresses of the host (the job has a
loopback of its own), the gateway's address, and the resolver's except for port 53. slirp4netns
would map the gateway to the host's loopback, and some versions map every port of a resolver that
runs there. The wall passes IPv4 alone.

Routes and rules refuse the same addresses, so that an ordinary attempt fails at once and not after
a time-out. They are no protection: a socket that is bound to the device ignores them.

Rejected: pasta. slirp4netns was ready in 12 ms instead of 22, takes 1 MB of the job's memory
instead of 20, answers DNS over TCP too, and needs no default route on the host.

Standard library only.
"""

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jobworker.sandbox.start import wall
from jobworker.sandbox.start.private_network import PROGRAM

PROCESSES = 2
"""How many processes slirp4netns has during its start. One of them stays."""
_DIRECTORIES = ("/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin")
_PREFIXES = ("10.0.2", "10.213.47", "172.29.101")


class Layout(NamedTuple):
    """The addresses in a private network, and those of the host that the job must not reach."""

    prefix: str
    """The first three bytes of the network's addresses, such as "10.0.2"."""
    host_addresses: tuple[str, ...]
    """The host's addresses outside of 127.0.0.0/8."""

    @property
    def address(self) -> str:
        """The job's address."""
        return f"{self.prefix}.100"

    @property
    def gateway(self) -> str:
        """The address that slirp4netns would map to the host's loopback."""
        return f"{self.prefix}.2"

    @property
    def resolver(self) -> str:
        """The address at which slirp4netns forwards DNS to the host's first resolver."""
        return f"{self.prefix}.3"

    @property
    def neighbours(self) -> tuple[str, str]:
        """The addresses of all other hosts in the network."""
        return self.gateway, self.resolver


def find_program(trees: Mapping[str, str]) -> str | None:
    """The path of slirp4netns on the host, or None if the host does not have it.

    `trees` has the path in the launcher's namespace of each directory of the host, such as
    "/layers/0" for "/usr".
    """
    for directory in _DIRECTORIES:
        for at, tree in trees.items():
            inside = directory.removeprefix(at)
            if directory.startswith(at) and os.access(f"{tree}{inside}/{PROGRAM}", os.X_OK):
                return f"{directory}/{PROGRAM}"
    return None


def choose_layout(addresses: Sequence[tuple[str, int]]) -> Layout:
    """A layout whose network does not overlap with the host's, or the first if all of them do.

    `addresses` are the host's addresses with the lengths of their prefixes in bits.
    """
    host = tuple(dict.fromkeys(address for address, _ in addresses))
    outside = tuple(address for address in host if not address.startswith("127."))
    for prefix in _PREFIXES:
        mine = wall.number_of(f"{prefix}.0")
        if not any(_overlap(mine, 24, wall.number_of(each), n) for each, n in addresses):
            return Layout(prefix, outside)
    return Layout(_PREFIXES[0], outside)


def resolv_conf(host_text: str, layout: Layout) -> str:
    """The text of the job's /etc/resolv.conf: the host's, with the network's own resolver."""
    kept = ("search ", "domain ", "options ")
    lines = [line for line in host_text.splitlines() if line.startswith(kept)]
    return "\n".join([f"nameserver {layout.resolver}", *lines, ""])


def _overlap(one: int, one_length: int, two: int, two_length: int) -> bool:
    shift = 32 - min(one_length, two_length)
    return one >> shift == two >> shift
