"""Whose the requests may be that the kernel keeps for netlink sockets, and long fdinfo."""

import fcntl
import os
import struct
from collections.abc import Iterable, Iterator

import pytest

from jobworker.sandbox.kernel_memory import open_files
from jobworker.sandbox.kernel_memory import search as kernel_search
from jobworker.sandbox.kernel_memory.measure import BYTES_PER_LOCK, NetlinkSocket

MOST = 1000


@pytest.mark.parametrize(
    ("kept", "others", "least", "most"),
    [(1500, 0, 1500, 1500), (1500, 1, 500, 1500), (1500, 2, 0, 1500), (5000, 1, 2000, 2000)],
)
def test_requests_are_a_jobs_as_far_as_no_others_may_have_made_them(
    kept: int, others: int, least: int, most: int
) -> None:
    listed = [
        NetlinkSocket(0, kept, is_listing=False),
        *(NetlinkSocket(inode, 7, is_listing=inode < 3) for inode in (1, 2, 3)),
        *(NetlinkSocket(10 + number, 7, is_listing=True) for number in range(others)),
    ]
    assert kernel_search._in_requests(listed, {1, 2, 3, 4}, MOST) == (least, most)


def test_job_that_has_asked_for_nothing_holds_no_requests() -> None:
    listed = [NetlinkSocket(0, 9 * MOST, is_listing=False), NetlinkSocket(1, 7, is_listing=False)]
    assert kernel_search._in_requests(listed, {1}, MOST) == (0, 0)


def test_fdinfo_is_read_a_piece_at_a_time() -> None:
    """A clock is looked at in between: one file may have millions of locks."""
    locks, file = 5000, os.memfd_create("locked")
    os.ftruncate(file, 4096)
    for at in range(locks):
        lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 2 * at, 1, 0)
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, lock)
    shown = kernel_search._Shown({}, sockets_too=False)
    seen = set()
    for _ in shown.take_in([os.getpid()]):
        seen.add(shown.locks // BYTES_PER_LOCK)
    os.close(file)
    assert max(seen) >= locks
    assert len([count for count in seen if 0 < count < locks]) >= 3, seen


@pytest.mark.parametrize(
    ("unknown", "reads"), [({}, False), ({"netlink": 1}, False), ({"00:01:7": 1}, True)]
)
def test_mappings_are_read_only_if_they_could_explain_locks(
    monkeypatch: pytest.MonkeyPatch, unknown: dict[str, int], *, reads: bool
) -> None:
    """A process that forks holds the lock of its mappings, for seconds if it gets no processor."""
    read = list[int]()

    def record(threads: Iterable[int]) -> Iterator[str]:
        read.extend(threads)
        yield ""

    monkeypatch.setattr(open_files, "mapped_memory_files", record)
    monkeypatch.setattr(kernel_search, "_threads_of", lambda _: [os.getpid()])
    assert kernel_search.search(os.getpid(), unknown).is_all
    assert bool(read) is reads
