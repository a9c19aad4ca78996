"""Logs of jobs that tests write, and what they read of them."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jobworker.jobs.output.files import OutputFiles
from jobworker.jobs.output.follower import Follower
from jobworker.jobs.output.index import LogChunk, Place, ReadFilter
from jobworker.jobs.output.spool import Spool
from jobworker.model.job import Stream

OUT, ERR = Stream.STDOUT, Stream.STDERR


PIECES = [(OUT, b"one\n"), (ERR, b"\x00\xff"), (OUT, b"two"), (OUT, b"3"), (ERR, b"end")]


MERGED = b"one\n\x00\xfftwo3end"


class Clock:
    """Counts instead of telling the time: each record has a stamp of its own."""

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        self.now_ns += 1
        return self.now_ns


def open_fds() -> dict[str, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[name] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the descriptor that listed the directory
            continue
    return found


@pytest.fixture(autouse=True)
def no_descriptor_leaks() -> Iterator[None]:
    before = open_fds()
    yield
    assert open_fds() == before


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """A disk that refuses: no file grows beyond `size` (EFBIG, setrlimit(2))."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def append(log: Spool | OutputFiles, stream: Stream, data: bytes) -> None:
    """Append through a real pipe; `data` fits in one."""
    read_end, write_end = os.pipe()
    try:
        if data:
            assert os.write(write_end, data) == len(data)
        os.close(write_end)
        while log.append_from_pipe(stream, read_end, 1 << 20):
            pass
    finally:
        os.close(read_end)


def read_all(
    files: OutputFiles,
    place: Place = Place(),  # noqa: B008
    view: ReadFilter = ReadFilter(),  # noqa: B008
) -> list[LogChunk]:
    chunks = []
    while place.offset < files.last.size:
        chunk, place = files.read(place, view, nowait=False)
        if chunk is not None:
            chunks.append(chunk)
    return chunks


def joined(chunks: list[LogChunk], stream: Stream | None = None) -> bytes:
    return b"".join(chunk.data for chunk in chunks if stream in (None, chunk.stream))


async def everything(follower: Follower, max_bytes: int = 65_526) -> list[LogChunk]:
    chunks = []
    while (chunk := await follower.receive(max_bytes)) is not None:
        chunks.append(chunk)
    return chunks


@contextmanager
def written(directory: Path) -> Iterator[OutputFiles]:
    files = OutputFiles.create(directory, clock=Clock())
    try:
        for stream, data in PIECES:
            append(files, stream, data)
        yield files
    finally:
        files.close()


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    spool = Spool.create(tmp_path / "job", clock=Clock())
    yield spool
    spool.close()


def log_as_told(files: OutputFiles) -> list[tuple[int, Stream, bytes]]:
    chunks = read_all(files, view=ReadFilter(coalesce=False))
    return [(chunk.offset, chunk.stream, bytes(chunk.data)) for chunk in chunks]


def tree_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}
