"""Sets up the job's side of a private network, in the process that becomes the job.

The gateway (`sandbox.network.gateway`) makes the network namespace and starts slirp4netns in it.
The job's process enters the namespace, waits until slirp4netns is ready, and builds the wall. It
does so before it gives up its rights.

The kernel has one table of neighbours for the host and all its namespaces, with room for 1,024
entries (gc_thresh3 of arp(7)). For a socket that is bound to the device and uses no route, each
address is a neighbour's. While the kernel asks for a neighbour by ARP, nothing removes its entry,
for some 3 s. So a job could fill the table. `_settle_neighbours` prevents this: it adds the two
neighbours that exist, and turns requests for others off. The kernel then marks a new entry as
failed at once, and removes failed entries when the table is full. Rejected: an interface without
ARP (IFF_NOARP), because slirp4netns would not learn the job's hardware address.

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
"""The name of the interface in the job's network."""
START_SECONDS = 20.0
WALL = "its wall"
"""The detail of a failed start whose wall could not be built."""

_HARDWARE_PREFIX = bytes.fromhex("5255")
"""The first two bytes of slirp4netns's hardware addresses; the IPv4 address follows."""


class GatewayHandle(NamedTuple):
    """The private network, as the process that becomes the job gets it from the launcher."""

    link: int
    """A socket to the gateway."""
    process: int
    """The gateway's pidfd."""
    wall: bytes
    """The BPF program of the wall."""
    neighbours: Sequence[str]
    """The IPv4 addresses that slirp4netns answers for."""


def enter(gateway_handle: GatewayHandle, groups: range) -> None:
    """Move this process into the private network, wait until it is up, and build the wall.

    `groups` are those of the job, see `network.allow`. The process must not be in a Landlock domain
    yet, which would deny it the gateway's descriptors. Raises OSError with the kernel's errno, or
    with errno 0 and the messages of slirp4netns as file name.
    """
    with socket.socket(fileno=gateway_handle.link) as link:
        link.settimeout(START_SECONDS)
        received = channel.receive(link)
    if received is None:
        raise OSError(0, "failed", "its gateway has ended")
    message, descriptors = received
    code, detail = message.get("errno"), message.get("detail")
    if isinstance(code, int):
        raise OSError(code, os.strerror(code), str(detail))
    namespace, ready, log = descriptors
    sc.setns(namespace, sc.CLONE_NEWNET)
    network.allow(groups)
    poll = select.poll()
    poll.register(ready, select.POLLIN)
    if not poll.poll(START_SECONDS * 1000):
        raise OSError(0, "failed", f"{PROGRAM} was not ready after {START_SECONDS:.0f} s")
    if not os.read(ready, 1):
        text = os.pread(log, 4096, 0).decode("utf-8", "replace")
        lines = [line for line in text.splitlines() if not line.startswith("WARNING")]
        raise OSError(0, "failed", ": ".join([PROGRAM, *(lines or ["ended"])]))
    _settle_neighbours(gateway_handle.neighbours)
    try:
        wall.build(gateway_handle.process, gateway_handle.wall)
    except OSError as error:
        raise OSError(error.errno, error.strerror, WALL) from error


def _settle_neighbours(addresses: Sequence[str]) -> None:
    """Make `addresses` the only neighbours in this namespace, permanently.

    The entries get the hardware addresses that slirp4netns would send as ARP replies. One ARP
    request is sent first. From it slirp4netns learns the job's hardware address before any packet
    of the job: some versions lose a packet for the job while they do not know that address.
    """
    tap = socket.if_nametoindex(TAP)
    netlink.look_for_neighbour(tap, addresses[0])
    netlink.ask_for_no_neighbours(tap)
    for address in addresses:
        netlink.keep_neighbour(tap, address, _HARDWARE_PREFIX + socket.inet_aton(address))
