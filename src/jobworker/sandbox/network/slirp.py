"""A network of the job's own with a way out: a process beside the job that speaks for it.

The job's packets go to slirp4netns, which has a TCP/IP stack in user space and opens ordinary
sockets on the host. So there is no bridge, no address and no firewall rule of ours on the host, and
nothing comes in that was not asked for.

    gateway (`sandbox.network.gateway`) ──► the network namespace, and a pipe that tells when it is
    up
        ──► the job's process enters, waits and builds the wall (`enter`), while it still may

What must hold: the network belongs to the gateway's user namespace, not to the job's, so the job
cannot configure it. What the job may not reach is dropped by the wall before slirp4netns can read
it (`sandbox.start.wall`): every address that the host has (the loopback is the job's own), the
gateway's, and the resolver's but at port 53. slirp4netns would map the gateway to the host's
loopback, and some versions also whatever port of a resolver that is there. Only IPv4 goes through.

The kernel has one table of neighbours for the host and all its namespaces, with room for 1,024
entries (gc_thresh3 of arp(7)). For a socket that is bound to the device and uses no route, each
address is a neighbour's. While the kernel asks for a neighbour by ARP, nothing removes its entry,
for some 3 s. So a job could fill the table. Here the kernel knows the two neighbours that there
are, and asks for no other (`_settle_neighbours`): it marks a new entry as failed at once, and
removes failed entries when the table is full. Rejected: an interface without ARP (IFF_NOARP), as
slirp4netns would not learn the job's hardware address.

Routes and rules refuse the same addresses, for a plain attempt to fail at once instead of after a
time-out. They hold nobody back: a socket that is bound to the device passes them by.

Why slirp4netns and not pasta: it was up in 12 ms against 22, takes 1 MB of the job's memory against
20, answers DNS over TCP too, and does not need a default route on the host.

Standard library only.
"""

import os
import select
import socket
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jobworker.sandbox import channel, netlink
from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.start import network, wall

PROGRAM = "slirp4netns"
TAP = "tap0"
"""The interface inside."""
PROCESSES = 2
"""What slirp4netns takes at its start; one of them stays."""
START_SECONDS = 20.0
WALL = "its wall"
"""What a failed start names where the wall could not be built."""

_OF_SLIRP = bytes.fromhex("5255")
"""What its hardware addresses begin with; the IPv4 address follows."""
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


class Way(NamedTuple):
    """What the process that becomes a job has of its network."""

    link: int
    """A socket to the gateway."""
    process: int
    """The gateway's pidfd."""
    wall: bytes
    """The program of its wall."""
    neighbours: Sequence[str]
    """The addresses that slirp4netns answers for."""


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


def enter(way: Way, groups: range) -> None:
    """In the process that becomes the job: enter the network, wait until it is up, and wall it in.

    `groups` are those of the job: see `network.allow`.

    It must not be in a Landlock domain yet, which would keep it from the gateway's descriptors.
    Raises OSError: the kernel's, or one with errno 0 whose file name is what slirp4netns said.
    """
    with socket.socket(fileno=way.link) as link:
        link.settimeout(START_SECONDS)
        received = channel.receive(link)
    if received is None:
        raise OSError(0, "failed", "its gateway has ended")
    message, descriptors = received
    code, detail = message.get("errno"), message.get("detail")
    if isinstance(code, int):
        raise OSError(code, os.strerror(code), str(detail))
    namespace, ready, said = descriptors
    sc.setns(namespace, sc.CLONE_NEWNET)
    network.allow(groups)
    poll = select.poll()
    poll.register(ready, select.POLLIN)
    if not poll.poll(START_SECONDS * 1000):
        raise OSError(0, "failed", f"{PROGRAM} was not ready after {START_SECONDS:.0f} s")
    if not os.read(ready, 1):
        said_text = os.pread(said, 4096, 0).decode("utf-8", "replace")
        words = [line for line in said_text.splitlines() if not line.startswith("WARNING")]
        raise OSError(0, "failed", ": ".join([PROGRAM, *(words or ["ended"])]))
    _settle_neighbours(way.neighbours)
    try:
        wall.build(way.process, way.wall)
    except OSError as error:
        raise OSError(error.errno, error.strerror, WALL) from error


def _settle_neighbours(addresses: Sequence[str]) -> None:
    """Make these the only neighbours in this namespace, for good.

    The hardware addresses are those that slirp4netns gives for ARP; it reads frames to any other as
    well. The job's it learns from the first request, which it reads before any packet of the job:
    some versions lose an answer that comes while they do not know whom to send it.
    """
    tap = socket.if_nametoindex(TAP)
    netlink.look_for_neighbour(tap, addresses[0])
    netlink.ask_for_no_neighbours(tap)
    for address in addresses:
        netlink.keep_neighbour(tap, address, _OF_SLIRP + socket.inet_aton(address))
