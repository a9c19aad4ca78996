"""The files of a spool are closed without making the event loop wait."""

import os
import threading
from pathlib import Path

import pytest
import trio
import trio.testing

from jobworker.jobs.output.ended import remove_output
from jobworker.jobs.output.spool import Spool

from .written_logs import (
    OUT,
    append,
    no_descriptor_leaks,
)

__all__ = ["no_descriptor_leaks"]


@pytest.mark.parametrize("is_removed", [True, False])
async def test_removed_files_are_closed_in_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_removed: bool
) -> None:
    """Their last close frees what they had on the disk and in the page cache."""
    spool = Spool.create(tmp_path / "job")
    append(spool, OUT, b"x" * 1000)
    await spool.seal()
    follower = spool.follow()
    spool.close()
    if is_removed:
        remove_output(tmp_path / "job", force=True, ended=True)
    closed, all_closed, close = dict[int, int](), threading.Event(), os.close
    files = {*spool._files.to_sync(), *spool._files._data.values()}

    def tell(file: int) -> None:
        close(file)
        closed[file] = threading.get_ident()
        if files <= closed.keys():
            all_closed.set()

    monkeypatch.setattr(os, "close", tell)
    follower.close()
    assert not spool.has_files
    assert await trio.to_thread.run_sync(all_closed.wait, 20)
    here = threading.get_ident()
    assert {closed[file] == here for file in files} == {not is_removed}
