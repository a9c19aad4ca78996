"""The output of ended jobs: sealed late, measured, removed."""

import os
from pathlib import Path

import pytest

from jobworker.errors import OutputError
from jobworker.jobs.output.ended import seal_output
from jobworker.jobs.output.files import OutputFiles
from jobworker.jobs.output.index import RECORD
from jobworker.jobs.output.spool import Spool

from .written_logs import (
    ERR,
    OUT,
    append,
    everything,
    joined,
    no_descriptor_leaks,
    tree_of,
)

__all__ = ["no_descriptor_leaks"]


@pytest.mark.parametrize(
    ("sizes", "there", "missing"),
    [
        ({}, (b"out one out two ", b"err one err two "), ""),
        ({"stdout": 5}, (b"out o", b"err one err two "), "11 of 16 bytes of stdout"),
        ({"stderr": 0}, (b"out one out two ", b""), "16 of 16 bytes of stderr"),
        ({"index": 0}, (b"out one out two ", b"err one err two "), ""),
        ({"index": RECORD.size + 3}, (b"out one out two ", b"err one err two "), ""),
        ({"index": None}, (b"out one out two ", b"err one err two "), ""),
        ({"stdout": None}, (b"", b"err one err two "), "16 of 16 bytes of stdout"),
        (
            {"stdout": 0, "stderr": 0, "index": 0},
            (b"", b""),
            "16 of 16 bytes of stdout and 16 of 16 bytes of stderr",
        ),
    ],
)
async def test_what_there_is_of_an_ended_log_is_read_and_what_is_missing_told(
    tmp_path: Path, sizes: dict[str, int | None], there: tuple[bytes, bytes], missing: str
) -> None:
    directory = tmp_path / "job"
    files = OutputFiles.create(directory)
    for words in (b"one ", b"two "):
        append(files, OUT, b"out " + words)
        append(files, ERR, b"err " + words)
    files.seal()
    files.close()
    for name, size in sizes.items():
        if size is None:
            (directory / name).unlink()
        else:
            os.truncate(directory / name, size)
    before = tree_of(directory)
    if None not in sizes.values():
        seal_output(directory)  # as a service does at its start
    spool = Spool.open_ended(directory, {OUT: 16, ERR: 16})
    with spool.follow() as follower:
        chunks = await everything(follower)
        assert (joined(chunks, OUT), joined(chunks, ERR)) == there
        if missing:
            with pytest.raises(OutputError, match=missing):
                follower.check_whole()
        else:
            follower.check_whole()
    spool.close()
    if missing:
        assert tree_of(directory) == before
