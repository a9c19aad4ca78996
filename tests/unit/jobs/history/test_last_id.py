"""The highest id that was given, kept beside the history."""

from pathlib import Path

import pytest

from jobworker.sandbox.protocol.requests import MAX_JOB

from .histories import opened, path

__all__ = ["path"]


@pytest.mark.parametrize("number", ["9007199254740991", str(MAX_JOB + 1), "9" * 40, "-1"])
def test_number_that_is_no_id_is_not_heeded_and_told(
    path: Path, number: str, caplog: pytest.LogCaptureFixture
) -> None:
    path.with_name("last-id").write_text(f"{number}\n")
    with opened(path) as history:
        assert history.take_id() == 1
    assert "which is no job's id" in caplog.text


def test_highest_id_stays_kept_whichever_thread_comes_last(path: Path) -> None:
    with opened(path) as history:
        first, second = history.take_id(), history.take_id()
        history.keep_id(second)
        history.keep_id(first)
    path.unlink()
    with opened(path) as history:
        assert history.take_id() == 3
