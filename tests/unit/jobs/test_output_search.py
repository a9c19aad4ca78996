"""Where a reader begins, against a model that looks at each byte."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jobworker.jobs.output_search as search
from jobworker.jobs.output_files import OutputFiles
from jobworker.jobs.output_index import BOTH
from jobworker.jobs.output_search import Start, find_start
from jobworker.model.job import Stream

from .test_spool import append

OUT, ERR = Stream.STDOUT, Stream.STDERR
Pieces = list[tuple[Stream, bytes]]

PIECES = st.lists(
    st.tuples(st.sampled_from(Stream), st.text("ab\n", min_size=1, max_size=9).map(str.encode)),
    max_size=12,
)


@contextmanager
def log_of(pieces: Pieces) -> Iterator[OutputFiles]:
    """A log with a record for each piece, at 100, 200, … nanoseconds."""
    times = iter(range(100, 100_000, 100))
    with tempfile.TemporaryDirectory() as directory:
        files = OutputFiles.create(Path(directory) / "job", clock=lambda: next(times))
        try:
            for stream, data in pieces:
                append(files, stream, data)
            yield files
        finally:
            files.close()


def line_starts(pieces: Pieces, streams: set[Stream]) -> list[int]:
    """The merged offset of each line's first byte, in order."""
    starts, offset = [], 0
    before = dict.fromkeys(Stream, b"\n")
    for stream, data in pieces:
        for value in data:
            if before[stream] == b"\n" and stream in streams:
                starts.append(offset)
            before[stream] = bytes([value])
            offset += 1
    return starts


@settings(deadline=None)
@given(
    pieces=PIECES,
    lines=st.integers(0, 12),
    streams=st.sampled_from([{OUT, ERR}, {OUT}, {ERR}]),
    block=st.integers(1, 5),
)
def test_tail_begins_with_the_last_lines(
    pieces: Pieces, lines: int, streams: set[Stream], block: int
) -> None:
    starts = line_starts(pieces, streams)
    size = sum(len(data) for _, data in pieces)
    expected = size if not lines else starts[-lines] if lines <= len(starts) else 0
    with log_of(pieces) as files, pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "BLOCK_BYTES", block)
        assert find_start(files, Start(tail_lines=lines), streams) == expected


def test_since_begins_with_what_was_written_then() -> None:
    with log_of([(OUT, b"a"), (ERR, b"bb"), (OUT, b"ccc")]) as files:
        found = [find_start(files, Start(since_ns=ns)) for ns in (0, 100, 101, 200, 300, 301)]
    assert found == [0, 0, 1, 1, 3, 6]


def test_the_latest_of_all_wishes_counts() -> None:
    with log_of([(OUT, b"a\n"), (OUT, b"b\n"), (OUT, b"c\n")]) as files:
        assert find_start(files, Start(offset=1, tail_lines=2, since_ns=100)) == 2
        assert find_start(files, Start(offset=1, tail_lines=2, since_ns=300)) == 4
        assert find_start(files, Start(offset=5, tail_lines=2)) == 5


def test_a_search_can_be_given_up() -> None:
    class GivenUp(Exception):
        pass

    def pause() -> None:
        raise GivenUp

    with log_of([(OUT, b"abc")]) as files, pytest.raises(GivenUp):
        find_start(files, Start(tail_lines=1), BOTH, pause)
