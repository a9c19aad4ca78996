"""The directory of a job's output: made, opened and removed safely."""

import os
import stat
from pathlib import Path

import pytest

from jobworker.errors import Busy, NotFound, OutputError
from jobworker.jobs.output.files import OutputFiles

from .written_logs import (
    no_descriptor_leaks,
    written,
)

__all__ = ["no_descriptor_leaks"]


def test_files_are_private_and_new(tmp_path: Path) -> None:
    OutputFiles.create(tmp_path / "job").close()
    assert stat.S_IMODE((tmp_path / "job").stat().st_mode) == 0o700
    for name in ("stdout", "stderr", "index"):
        assert stat.S_IMODE((tmp_path / "job" / name).stat().st_mode) == 0o600
    with pytest.raises(OutputError, match="cannot create the job's output: File exists"):
        OutputFiles.create(tmp_path / "job")


def test_a_link_in_the_way_is_not_followed_and_nothing_is_left(tmp_path: Path) -> None:
    job = tmp_path / "job"
    job.mkdir()
    (job / "index").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="cannot create"):
        OutputFiles.create(job)
    assert os.listdir(job) == ["index"]
    assert not (tmp_path / "elsewhere").exists()


def test_a_linked_file_or_directory_is_not_opened(tmp_path: Path) -> None:
    with written(tmp_path / "job") as files:
        files.seal()
    (tmp_path / "link").symlink_to(tmp_path / "job")
    with pytest.raises(OutputError, match="cannot open"):
        OutputFiles.open(tmp_path / "link")
    (tmp_path / "job" / "stdout").rename(tmp_path / "moved")
    (tmp_path / "job" / "stdout").symlink_to(tmp_path / "moved")
    with pytest.raises(OutputError, match="cannot open"):
        OutputFiles.open(tmp_path / "job")


def test_missing_output_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        OutputFiles.open(tmp_path / "job")
    OutputFiles.create(tmp_path / "job").close()
    (tmp_path / "job" / "stderr").unlink()
    with pytest.raises(NotFound):
        OutputFiles.open(tmp_path / "job")


def test_a_second_writer_is_kept_out(tmp_path: Path) -> None:
    with written(tmp_path / "job"), pytest.raises(Busy, match="it is being written"):
        OutputFiles.open(tmp_path / "job")
    OutputFiles.open(tmp_path / "job").close()
