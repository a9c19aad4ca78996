"""What is told of netlink sockets on the host's network, and of whom while it is measured."""

import os
import socket
import struct
from collections.abc import Callable, Mapping

import pytest

from jobworker.sandbox.kernel_memory import connections as kernel_connections
from jobworker.sandbox.kernel_memory import measure as kernel_memory
from jobworker.sandbox.kernel_memory.measure import NETLINK_BYTES, NetlinkSocket

WRONG = struct.pack("=IHHII", 512, 0x7FFF, 1, 1, 0) + bytes(496)
"""A request that is answered by an error that repeats it."""


def netlink() -> socket.socket:
    one = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
    one.bind((0, 0))
    return one


def test_what_is_nobodys_is_one_sum_however_many_sockets_there_are() -> None:
    before = sum(kernel_memory.measure_netlink({os.getpid(): 7}).unknown.values())
    held = [netlink() for _ in range(100)]
    held += [socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) for _ in range(100)]
    for one in held[:100]:
        one.send(WRONG)
    unknown = kernel_memory.measure_netlink({os.getpid(): 7}).unknown
    for one in held:
        one.close()
    assert len(unknown) == 1
    assert sum(unknown.values()) - before > 150 * NETLINK_BYTES + 50 * len(WRONG)


@pytest.mark.parametrize(
    "look",
    [kernel_memory.measure_netlink, kernel_connections.measure, kernel_memory._own_devices],
)
def test_job_that_is_looked_at_is_told(
    look: Callable[[Mapping[int, int], kernel_memory.LookAt], object],
) -> None:
    """Whoever started a process that dies of it knows of which, and of none afterwards."""
    told = list[int]()
    look({os.getpid(): 7}, told.append)
    assert 7 in told
    assert told[-1] == 0


def test_request_that_the_kernel_keeps_counts_as_its_own() -> None:
    with netlink() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        one.setblocking(False)
        try:
            for _ in range(10):
                one.send(WRONG)
        except BlockingIOError:
            pass
        one.send(struct.pack("=IHHIIB", 100_000, 18, 0x301, 2, 0, 0) + bytes(99_983))
        listed = list(kernel_memory.netlink_sockets("/proc/self"))
        (own,) = (each for each in listed if each.inode == os.fstat(one.fileno()).st_ino)
    assert own == NetlinkSocket(own.inode, own.memory_bytes, is_listing=True)
    assert own.memory_bytes < 10_000
    assert max(each.memory_bytes for each in listed if not each.inode) >= 100_000
