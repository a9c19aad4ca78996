"""Which files threads have open and mapped: tables that they share are read once."""

import contextlib
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.kernel_memory import open_files


@pytest.fixture
def other_thread() -> Iterator[int]:
    """A thread of this process, which shares all its tables."""
    done, known = threading.Event(), threading.Event()
    ids: list[int] = []

    def run() -> None:
        ids.append(threading.get_native_id())
        known.set()
        done.wait()

    thread = threading.Thread(target=run)
    thread.start()
    known.wait()
    yield ids[0]
    done.set()
    thread.join()


@pytest.fixture
def memfd() -> Iterator[int]:
    made = os.memfd_create("shown")
    os.ftruncate(made, mmap.PAGESIZE)
    yield made
    os.close(made)


def test_descriptors_that_threads_share_are_listed_once(other_thread: int, memfd: int) -> None:
    here = os.getpid()
    found = list(open_files.descriptors([here, other_thread]))
    target = os.readlink(f"/proc/self/fd/{memfd}")
    assert found.count((here, str(memfd), target)) == 1
    assert {thread for thread, _, _ in found} == {here}


def test_thread_that_cannot_be_compared_is_read_too(
    other_thread: int, memfd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(38, "on purpose")

    monkeypatch.setattr(sc, "kcmp", refuse)
    found = open_files.descriptors([os.getpid(), other_thread])
    assert [name for _, name, _ in found].count(str(memfd)) == 2


def test_thread_that_has_ended_has_no_files() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    assert list(open_files.descriptors([pid])) == []
    assert list(open_files.mapped_memory_files([pid])) == []
    assert list(open_files.fdinfo(pid, "0")) == []
    assert open_files.file_at(pid, "0") == ""


def test_mapped_memfd_is_found_by_the_name_that_its_descriptor_has(memfd: int) -> None:
    here, name = os.getpid(), open_files.file_at(os.getpid(), str(memfd))
    assert name not in set(open_files.mapped_memory_files([here]))
    with mmap.mmap(memfd, mmap.PAGESIZE):
        found = list(open_files.mapped_memory_files([here]))
    assert found.count(name) == 1


def test_other_mapped_file_has_no_name(tmp_path: Path) -> None:
    with open(tmp_path / "mapped", "w+b") as file:
        file.truncate(mmap.PAGESIZE)
        name = open_files.file_at(os.getpid(), str(file.fileno()))
        with mmap.mmap(file.fileno(), mmap.PAGESIZE):
            found = list(open_files.mapped_memory_files([os.getpid()]))
    assert name not in found
    assert "" in found


def test_copy_of_a_descriptor_is_closed_with_its_owner(memfd: int) -> None:
    with contextlib.ExitStack() as opened:
        copy = open_files.copy_of(os.getpid(), memfd, opened)
        assert os.path.sameopenfile(copy, memfd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(copy)
