"""The directory of a job's output: made, opened and removed safely."""

import errno
import fcntl
import os
import shutil
import stat
from pathlib import Path

import pytest

from jobworker.errors import Busy, NotFound, OutOfDescriptors, OutputError
from jobworker.jobs.history.job_note import make_note, read_note, write_note
from jobworker.jobs.output.directory import (
    NAMES,
    NOTE,
    clear_mark,
    create_files,
    disk_errors,
    full_disk_may_refuse,
    lock_to_read,
    mark_of,
    marked_job,
    open_files,
    was_removed,
)
from jobworker.jobs.output.files import OutputFiles

from ...strategies import record
from ..descriptors import descriptors_left
from .written_logs import no_descriptor_leaks, written

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


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """The directory of a sealed log with a note."""
    spools = tmp_path / "spool"
    spools.mkdir()
    with written(spools / "7") as files:
        files.seal()
    make_note(spools, record(7))
    return spools / "7"


def removed(directory: Path, *, force: bool = False) -> None:
    files = OutputFiles.look_at(directory)
    try:
        files.remove(directory, force=force)
    finally:
        files.close()


# --- making and opening -----------------------------------------------------------------------


def test_directory_that_was_made_for_nothing_is_removed(tmp_path: Path) -> None:
    with descriptors_left(2), pytest.raises(OutOfDescriptors) as refused:
        create_files(tmp_path / "job")  # the directory and one file
    assert "LimitNOFILE" in refused.value.remedy
    assert list(tmp_path.iterdir()) == []


def test_missing_file_is_an_empty_one_in_memory_if_a_part_is_enough(job: Path) -> None:
    (job / "stdout").unlink()
    with pytest.raises(NotFound):
        open_files(job, writable=False)
    fds = open_files(job, writable=False, partial=True)
    assert [os.fstat(fd).st_size > 0 for fd in fds] == [False, True, True]
    for fd in fds:
        os.close(fd)
    with pytest.raises(NotFound):
        open_files(job.with_name("8"), writable=False, partial=True)


def test_fault_of_the_disk_names_what_was_done_and_the_remedy(tmp_path: Path) -> None:
    def fail(number: int, directory: Path | None = None) -> OutputError:
        with pytest.raises(OutputError) as refused, disk_errors("open", directory):
            raise OSError(number, os.strerror(number))
        return refused.value

    assert fail(errno.EIO).message == "cannot open the job's output: Input/output error"
    assert fail(errno.EIO).data == {"cut": "disk"}
    assert "kernel's log" in fail(errno.EIO).remedy
    assert "make room" in fail(errno.ENOSPC).remedy
    assert fail(errno.EINVAL).remedy == ""
    assert fail(errno.EACCES).remedy == ""
    denied = fail(errno.EACCES, tmp_path)
    assert str(tmp_path) in denied.message
    assert f"chown -R {os.geteuid()} {tmp_path}" in denied.remedy


def test_lack_of_bytes_or_descriptors_is_no_fault_of_the_disk() -> None:
    with pytest.raises(BlockingIOError), disk_errors("read"):
        raise BlockingIOError
    for number in (errno.EMFILE, errno.ENFILE):
        with pytest.raises(OutOfDescriptors), disk_errors("open"):
            raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_only_a_full_disk_may_refuse(number: int) -> None:
    with full_disk_may_refuse():
        raise OSError(number, os.strerror(number))
    with pytest.raises(OSError, match="Input/output"), full_disk_may_refuse():
        raise OSError(errno.EIO, os.strerror(errno.EIO))


# --- removal ----------------------------------------------------------------------------------


def test_removal_leaves_the_mark_with_the_note_alone(job: Path) -> None:
    assert not was_removed(job)
    removed(job)
    assert os.listdir(job.parent) == ["7.removed"]
    assert os.listdir(mark_of(job)) == [NOTE]
    assert mark_of(job).stat().st_mode & stat.S_ISVTX
    assert was_removed(job)
    clear_mark(job)
    clear_mark(job)
    assert (os.listdir(job.parent), was_removed(job)) == ([], False)


def test_output_that_is_there_again_was_not_removed(job: Path) -> None:
    shutil.copytree(job, job.with_name("copy"))
    removed(job)
    job.with_name("copy").rename(job)
    assert not was_removed(job)
    later = record(7, detail="it was put back")
    write_note(job.parent, later)
    removed(job)  # over the mark of the first time
    assert was_removed(job)
    assert os.listdir(mark_of(job)) == [NOTE]
    assert read_note(job.parent, later.id) == later


def test_output_that_is_being_read_is_removed_by_force_alone(job: Path) -> None:
    reader = open_files(job, writable=False)
    lock_to_read(reader[-1])
    with pytest.raises(Busy, match="it is being read"):
        removed(job)
    assert sorted(os.listdir(job)) == sorted((*NAMES, NOTE))
    removed(job, force=True)
    assert was_removed(job)
    lock_to_read(reader[-1])  # raises nothing, whoever has the lock
    for fd in reader:
        os.close(fd)


def test_reader_does_not_wait_for_a_removal_under_way(job: Path) -> None:
    one, other = open_files(job, writable=False), open_files(job, writable=False)
    fcntl.flock(one[-1], fcntl.LOCK_EX)
    lock_to_read(other[-1])
    for fd in (*one, *other):
        os.close(fd)


def test_removal_without_a_mark_removes_all(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the disk refuses the rename."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        removed(job)
    assert (os.listdir(job.parent), was_removed(job)) == ([], False)


# --- marks ------------------------------------------------------------------------------------


def test_mark_names_its_job() -> None:
    assert marked_job("7.removed") == "7"
    assert marked_job("7") == marked_job("removed") == ""


def mark(job: Path, *, sticky: bool) -> Path:
    job.rename(mark_of(job))
    mark_of(job).chmod(0o1700 if sticky else 0o700)
    return mark_of(job)


@pytest.mark.parametrize("sticky", [True, False])
def test_directory_of_such_a_name_with_output_is_a_mark_only_by_its_bit(
    job: Path, sticky: bool
) -> None:
    made = mark(job, sticky=sticky)
    assert was_removed(job) is sticky
    clear_mark(job)
    assert made.exists() is not sticky, "another program's directory stays"


def test_copy_of_a_mark_that_has_lost_the_bit_is_one_by_its_note(job: Path) -> None:
    made = mark(job, sticky=False)
    for name in NAMES:
        (made / name).unlink()
    assert was_removed(job)
    assert not was_removed(job.with_name("8"))
    made.rename(mark_of(job.with_name("8")))
    assert not was_removed(job.with_name("8")), "it is another job's note"


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"spec":1,"id":8}', '{"id":7}', "\x00", "é\n"])
def test_file_that_is_no_note_makes_no_mark(tmp_path: Path, text: str) -> None:
    made = tmp_path / "7.removed"
    made.mkdir()
    assert was_removed(tmp_path / "7"), "an empty one holds nothing of anybody"
    (made / NOTE).write_text(text, encoding="latin-1")
    assert not was_removed(tmp_path / "7")
    clear_mark(tmp_path / "7")
    assert (made / NOTE).exists()


def test_link_or_file_is_no_mark(tmp_path: Path, job: Path) -> None:
    (tmp_path / "7.removed").write_text("")
    assert not was_removed(tmp_path / "7")
    (tmp_path / "8.removed").symlink_to(mark(job, sticky=True))
    assert not was_removed(tmp_path / "8")
    nested = tmp_path / "9.removed"
    nested.mkdir()
    (nested / NOTE).symlink_to(tmp_path / "7.removed")
    assert not was_removed(tmp_path / "9")


def test_directory_of_another_user_is_no_mark(ordinary_directory: Path) -> None:
    made = ordinary_directory / "7.removed"
    made.mkdir(mode=0)
    assert not was_removed(ordinary_directory / "7")
    made.chmod(0o700)
