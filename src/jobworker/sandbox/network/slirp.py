"""A network of the job's own with a way out: a process beside the job that speaks for it.

The job's packets go to slirp4netns, which has a TCP/IP stack in user space and opens ordinary
sockets on the host. So there is no bridge, no address and no firewall rule of ours on the host, and
nothing comes in that was not asked for.

    gateway (`network.gateway`) ──► the network namespace, and a pipe that tells when it is up
        ──► the job's process enters, waits and builds the wall (`start.private_network`)

What must hold: the network belongs to the gateway's user namespace, not to the job's, so the job
cannot configure it. What the job may not reach is dropped by the wall before slirp4netns can read
it (`sandbox.start.wall`): every address that the host has (the loopback is the job's own), the
gateway's, and the resolver's but at port 53. slirp4netns would map the gateway to the host's
loopback, and some versions also whatever port of a resolver that is there. Only IPv4 goes through.

Routes and rules refuse the same addresses, for a plain attempt to fail at once instead of after a
time-out. They hold nobody back: a socket that is bound to the device passes them by.

Why slirp4netns and not pasta: it was up in 12 ms against 22, takes 1 MB of the job's memory against
20, answers DNS over TCP too, and does not need a default route on the host.

Standard library only.
"""

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jobworker.sandbox.start import wall
from jobworker.sandbox.start.private_network import PROGRAM

PROCESSES = 2
"""What slirp4netns takes at its start; one of them stays."""
_DIRECTORIES = ("/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin")
_PREFIXES = ("10.0.2", "10.213.47", "172.29.101")


class Layout(NamedTuple):
    """The addresses inside, and what of the host is out of reach."""

    prefix: str
    host_addresses: tuple[str, ...]

    @property
    def address(self) -> str:
        """The job's."""
        return f"{self.prefix}.100"

    @property
    def gateway(self) -> str:
        """What would be the host's loopback."""
        return f"{self.prefix}.2"

    @property
    def resolver(self) -> str:
        """Where the host's first resolver answers."""
        return f"{self.prefix}.3"

    @property
    def neighbours(self) -> tuple[str, str]:
        """All that is there beside the job."""
        return self.gateway, self.resolver


def find_program(trees: Mapping[str, str]) -> str | None:
    """The path of slirp4netns; None where the host lacks it.

    `trees` are what the host's directories are called here: "/usr" may be "/layers/0".
    """
    for directory in _DIRECTORIES:
        for at, tree in trees.items():
            inside = directory.removeprefix(at)
            if directory.startswith(at) and os.access(f"{tree}{inside}/{PROGRAM}", os.X_OK):
                return f"{directory}/{PROGRAM}"
    return None


def choose_layout(addresses: Sequence[tuple[str, int]]) -> Layout:
    """Addresses that the host does not use itself; `addresses` are its own, with prefix lengths."""
    host = tuple(dict.fromkeys(address for address, _ in addresses))
    outside = tuple(address for address in host if not address.startswith("127."))
    for prefix in _PREFIXES:
        mine = wall.number_of(f"{prefix}.0")
        if not any(_overlap(mine, 24, wall.number_of(each), n) for each, n in addresses):
            return Layout(prefix, outside)
    return Layout(_PREFIXES[0], outside)


def resolv_conf(host_text: str, layout: Layout) -> str:
    """What the job's /etc/resolv.conf says: the host's with its resolver's place inside."""
    kept = ("search ", "domain ", "options ")
    lines = [line for line in host_text.splitlines() if line.startswith(kept)]
    return "\n".join([f"nameserver {layout.resolver}", *lines, ""])


def _overlap(one: int, one_length: int, two: int, two_length: int) -> bool:
    shift = 32 - min(one_length, two_length)
    return one >> shift == two >> shift
