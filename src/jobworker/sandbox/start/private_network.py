"""The job's side of a private network, run by the process that becomes the job.

The gateway (`sandbox.network.gateway`) makes the network and starts slirp4netns in it. The job's
process enters the network, waits until it is up, and builds the wall, while it still may.

The kernel has one table of neighbours for the host and all its namespaces, with room for 1,024
entries (gc_thresh3 of arp(7)). For a socket that is bound to the device and uses no route, each
address is a neighbour's. While the kernel asks for a neighbour by ARP, nothing removes its entry,
for some 3 s. So a job could fill the table. Here the kernel knows the two neighbours that there
are, and asks for no other (`_settle_neighbours`): it marks a new entry as failed at once, and
removes failed entries when the table is full. Rejected: an interface without ARP (IFF_NOARP), as
slirp4netns would not learn the job's hardware address.

Standard library only.
"""

import os
import select
import socket
from collections.abc import Sequence
from typing import NamedTuple

from jobworker.sandbox import channel, netlink
from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.start import network, wall

PROGRAM = "slirp4netns"
TAP = "tap0"
"""The interface inside."""
START_SECONDS = 20.0
WALL = "its wall"
"""What a failed start names where the wall could not be built."""

_OF_SLIRP = bytes.fromhex("5255")
"""What its hardware addresses begin with; the IPv4 address follows."""


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
