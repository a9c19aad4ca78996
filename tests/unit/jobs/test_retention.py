"""Retention: what may not go though it is chosen, what is missing, and what is counted."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from jobworker.errors import Busy, OutputError
from jobworker.jobs.history.job_note import make_note
from jobworker.jobs.output.budget import OutputBudget
from jobworker.jobs.output.directory import NAMES, NOTE, clear_marks
from jobworker.jobs.output.files import OutputFiles
from jobworker.jobs.retention import KeptOutput
from jobworker.jobs.retention_policy import EndedOutput, RetentionPolicy
from jobworker.jobs.sweep import prune
from jobworker.model.job import JobId, OutputCut, Stream

from ..strategies import record
from .output.written_logs import append

SECOND = 1_000_000_000


@pytest.mark.parametrize("policy", [RetentionPolicy(max_jobs=1), RetentionPolicy(max_bytes=700)])
def test_who_reads_the_oldest_output_has_the_next_go(
    tmp_path: Path, policy: RetentionPolicy
) -> None:
    for name in ("1", "2", "3", "4"):
        write_log(tmp_path / name, b"x" * 200).close()
        os.utime(tmp_path / name, ns=(int(name), int(name)))
    kept = KeptOutput(tmp_path)
    kept.load()
    reader = OutputFiles.open(tmp_path / "1")
    (tmp_path / "2").rename(tmp_path / "2.away")  # by another hand: it counts for nothing
    assert [each.job for each in prune(kept, policy)] == [3]
    reader.close()
    assert sorted(kept.all) == [1, 4]
    assert kept.last[0] == kept.all[JobId(4)].ended_ns


class Watched(dict[JobId, EndedOutput]):
    """Counts the outputs that are looked at."""

    looks = 0

    def __getitem__(self, job: JobId) -> EndedOutput:
        self.looks += 1
        return super().__getitem__(job)

    def __iter__(self) -> Iterator[JobId]:
        raise AssertionError("all of it is looked at")

    def values(self) -> NoReturn:
        raise AssertionError("all of it is looked at")


def test_no_more_is_looked_at_than_what_goes_and_the_next(tmp_path: Path) -> None:
    for name in map(str, range(1, 8)):
        write_log(tmp_path / name, b"x").close()
    kept = KeptOutput(tmp_path)
    kept.load()
    kept._kept = watched = Watched(kept._kept)
    assert [len(prune(kept, RetentionPolicy(max_jobs=jobs))) for jobs in (7, 5)] == [0, 2]
    assert watched.looks == 1 + 3


def test_output_counts_for_its_owner_while_it_is_there(tmp_path: Path) -> None:
    for name in ("1", "2", "3", "4"):
        write_log(tmp_path / name, b"x" * 200).close()
    size = sum(file.stat().st_size for file in (tmp_path / "1").iterdir())
    kept = KeptOutput(tmp_path, seals=True)
    kept.load({JobId(4)}, {JobId(1): "alice", JobId(2): "alice", JobId(3): "bob"})
    sizes = [(kept.size_of("alice"), kept.size_of("bob"))]
    kept.end(JobId(4), 0, "bob")
    (tmp_path / "1").rename(tmp_path / "away")
    kept.look()
    sizes.append((kept.size_of("alice"), kept.size_of("bob")))
    kept.remove(JobId(2))
    (tmp_path / "away").rename(tmp_path / "1")
    kept.look()
    kept.remove(JobId(3))
    sizes.append((kept.size_of("alice"), kept.size_of("bob")))
    assert sizes == [(2 * size, size), (size, 2 * size), (size, size)]
    kept.remove(JobId(1))
    kept.remove(JobId(4))
    kept.forget(map(JobId, range(1, 5)))
    assert (kept._sizes, kept._numbers, kept._owners, kept._order) == ({}, {}, {}, [])


def test_removal_that_fails_is_not_tried_again_though_it_makes_the_end_a_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = list[str]()

    def fail(directory: Path, **_: object) -> int:
        tried.append(directory.name)
        os.utime(directory, ns=(len(tried) * SECOND, 2 * kept.last[0]))
        raise OutputError("cannot remove the job's output: I/O error")

    for name in ("1", "2"):
        write_log(tmp_path / name, b"x").close()
    kept = KeptOutput(tmp_path)
    kept.load()
    monkeypatch.setattr("jobworker.jobs.retention.remove_output", fail)
    assert prune(kept, RetentionPolicy(max_jobs=0)) == []
    assert sorted(tried) == ["1", "2"]


def removed(kept: KeptOutput) -> list[JobId]:
    """The jobs whose output was removed, by their marks."""
    return kept.find_removed(kept.look())


def write_log(directory: Path, data: bytes, *, seal: bool = True) -> OutputFiles:
    directory.parent.mkdir(exist_ok=True)
    files = OutputFiles.create(directory)
    append(files, Stream.STDOUT, data)
    if seal:
        files.seal()
    return files


def test_output_goes_with_its_directory_and_its_size_is_told(tmp_path: Path) -> None:
    write_log(tmp_path / "1", b"x" * 100).close()
    kept = KeptOutput(tmp_path)
    kept.load()
    size = sum(file.stat().st_size for file in (tmp_path / "1").iterdir())
    assert [(k.job, k.size) for k in kept.all.values()] == [(1, size)]
    assert kept.remove(JobId(1)) == size
    (mark,) = tmp_path.iterdir()
    assert (mark.name, list(mark.iterdir())) == ("1.removed", [])
    clear_marks(tmp_path, [JobId(1)])
    assert list(tmp_path.iterdir()) == []
    assert kept.remove(JobId(1)) == 0


def test_log_that_has_not_ended_stays(tmp_path: Path) -> None:
    files = write_log(tmp_path / "1", b"x", seal=False)
    kept = KeptOutput(tmp_path)
    kept.load()
    assert not kept.all
    with pytest.raises(Busy, match="not ended"):
        kept.remove(JobId(1), force=True)
    files.close()
    kept.load()  # as `worker prune` does it: a job may live without its service
    assert not kept.all
    with pytest.raises(Busy, match="not ended"):
        kept.remove(JobId(1))


def test_log_that_a_full_disk_did_not_let_end_is_ended_by_the_service(tmp_path: Path) -> None:
    files = write_log(tmp_path / "1", b"x", seal=False)
    kept = KeptOutput(tmp_path, seals=True)
    kept.load(live={JobId(1)})
    assert not kept.all
    kept.add(JobId(1))
    assert list(kept.all) == [1]
    assert not prune(kept, RetentionPolicy(max_jobs=0))  # who followed it to its end has it open
    files.close()
    kept.add(JobId(1))
    look = OutputFiles.look_at(tmp_path / "1")
    assert look.sealed
    look.close()
    assert [each.job for each in prune(kept, RetentionPolicy(max_jobs=0))] == [1]


@pytest.mark.parametrize("lost", [["stderr"], ["index"], ["stdout", "stderr", "index"]])
def test_what_is_left_of_output_is_kept_and_goes_like_any_other(
    tmp_path: Path, lost: list[str]
) -> None:
    write_log(tmp_path / "1", b"x" * 1000).close()
    (tmp_path / "1" / NOTE).write_text("{}")
    for name in lost:
        (tmp_path / "1" / name).unlink()
    late, kept = KeptOutput(tmp_path, seals=True), KeptOutput(tmp_path, seals=True)
    late.load()  # of a service that is started later
    kept.end(JobId(1))
    left = sum((tmp_path / "1" / name).stat().st_size for name in {*NAMES} - {*lost})
    for each in (late, kept):
        assert [(k.job, k.size) for k in each.all.values()] == [(1, left)]
        each.look()
        assert each.missing == 0
    assert late.all == kept.all, "age counts from the end, and not from a look"
    assert [each.job for each in prune(kept, RetentionPolicy(max_jobs=0))] == [1]
    assert os.listdir(tmp_path) == ["1.removed"]


def test_log_that_is_read_stays_unless_forced(tmp_path: Path) -> None:
    write_log(tmp_path / "1", b"read on").close()
    reader = OutputFiles.open(tmp_path / "1")
    kept = KeptOutput(tmp_path)
    kept.load()
    assert prune(kept, RetentionPolicy(max_jobs=0)) == []
    with pytest.raises(Busy, match="being read"):
        kept.remove(JobId(1))
    kept.remove(JobId(1), force=True)
    assert reader.read_stream(Stream.STDOUT, 0, 7) == b"read on"
    reader.close()


def test_nothing_is_removed_through_a_link(tmp_path: Path) -> None:
    write_log(tmp_path / "elsewhere", b"x").close()
    (tmp_path / "spool").mkdir()
    (tmp_path / "spool" / "1").symlink_to(tmp_path / "elsewhere")
    kept = KeptOutput(tmp_path / "spool")
    kept.load()
    assert not kept.all
    with pytest.raises(OutputError):
        kept.remove(JobId(1))
    assert len(os.listdir(tmp_path / "elsewhere")) == 3


def test_what_another_process_removed_is_dropped_and_known_until_that_is_noted(
    tmp_path: Path,
) -> None:
    write_log(tmp_path / "1", b"x").close()
    kept, other = KeptOutput(tmp_path), KeptOutput(tmp_path)
    kept.load()
    other.load()
    prune(other, RetentionPolicy(max_jobs=0))
    for dropped in (1, 1):
        assert removed(kept) == [1]
        assert (kept.dropped, kept.missing) == (dropped, 0)
    assert not kept.all
    clear_marks(tmp_path, [JobId(1)])
    assert kept.look() == []


def test_what_was_moved_away_counts_for_nothing_until_it_is_back(tmp_path: Path) -> None:
    spools, away = tmp_path / "spool", tmp_path / "away"
    for name in ("1", "2"):
        write_log(spools / name, b"x").close()
    kept = KeptOutput(spools, seals=True)
    kept.load()
    spools.rename(away)
    assert (kept.look(), kept.dropped, kept.missing) == ([], 2, 2)
    assert not kept.all
    kept.end(JobId(3))
    assert kept.missing == 3
    late = KeptOutput(spools, seals=True)  # of a service that is started meanwhile
    late.load()
    late.expect([JobId(1), JobId(2)])
    away.rename(spools)
    for each in (kept, late):
        each.look()
        assert sorted(each.all) == [1, 2]
    assert (kept.missing, late.missing) == (1, 0)


def test_output_that_cannot_be_read_is_passed_over_until_it_can(
    ordinary_directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spools = ordinary_directory
    for name in ("1", "2", "3", "4"):
        write_log(spools / name, b"x").close()
        (spools / name / NOTE).write_text("{}")
    (spools / "4").chmod(0)
    kept = KeptOutput(spools, seals=True)
    kept.load()
    (spools / "1").chmod(0)
    assert [each.job for each in prune(kept, RetentionPolicy(max_jobs=1))] == [2]
    assert list(kept.all) == [3]
    with pytest.raises(OutputError, match=rf"in {spools}/1: Permission denied; .* chown -R .*/1"):
        kept.remove(JobId(1), force=True)
    kept.look()
    for job in (1, 4):
        told = f"job {job}: its output counts for nothing, and stays: cannot open the job's output"
        assert caplog.text.count(told) == 1
    (spools / "1").chmod(0o700)
    (spools / "4").rename(spools / "away")
    kept.look()
    assert (sorted(kept.all), kept.missing) == ([1, 3], 1)
    (spools / "away").rename(spools / "4")
    (spools / "4").chmod(0o700)
    kept.look()
    assert (sorted(kept.all), kept.missing) == ([1, 3, 4], 0)


def test_budget_gives_what_is_left_and_then_refuses(tmp_path: Path) -> None:
    budget = OutputBudget(tmp_path, max_bytes=100)
    assert budget.reserve(60) == 60
    assert budget.reserve(60) == 40
    with pytest.raises(OutputError, match="all jobs together") as raised:
        budget.reserve(1)
    assert raised.value.data["cut"] == OutputCut.TOTAL.value
    budget.release(10)
    assert budget.reserve(60) == 10


def test_budget_leaves_room_on_the_disk(tmp_path: Path) -> None:
    budget = OutputBudget(tmp_path, keep_free_bytes=1 << 60)
    with pytest.raises(OutputError, match="are free") as raised:
        budget.reserve(1)
    assert raised.value.data["cut"] == OutputCut.DISK.value
    assert budget.used_bytes == 0


def test_removal_of_what_was_put_back_leaves_a_mark_of_its_own(tmp_path: Path) -> None:
    kept = KeptOutput(tmp_path)
    for _ in range(2):
        write_log(tmp_path / "1", b"x").close()
        (tmp_path / "1" / "record").write_text("note")
        kept.load()
        assert prune(kept, RetentionPolicy(max_jobs=0))
        assert removed(kept) == [1]
        assert [path.name for path in (tmp_path / "1.removed").iterdir()] == ["record"]


def test_mark_that_a_copy_took_the_sticky_bit_of_is_ours_with_the_jobs_note_alone(
    tmp_path: Path,
) -> None:
    for job in (1, 2, 3):
        directory = tmp_path / str(job)
        write_log(directory, b"x").close()
        make_note(tmp_path, record(job))
        for file in NAMES if job != 2 else ():  # that one is somebody's own name for it
            (directory / file).unlink()
        directory.rename(tmp_path / f"{job}.removed")
    (tmp_path / "3.removed").rename(tmp_path / "4.removed")  # with a note of another job
    (tmp_path / "5.removed").mkdir()
    (tmp_path / "5.removed" / NOTE).write_text("of somebody else's")
    (tmp_path / "6.removed").mkdir()
    os.mkfifo(tmp_path / "6.removed" / NOTE)
    kept = KeptOutput(tmp_path, seals=True)
    assert removed(kept) == [1]
    clear_marks(tmp_path, (JobId(job) for job in range(1, 7)))
    assert {path.name for path in tmp_path.iterdir()} == {f"{job}.removed" for job in (2, 4, 5, 6)}
    assert len(list((tmp_path / "2.removed").iterdir())) == 4


def test_directory_called_like_a_mark_is_none_unless_it_is_ours_or_empty(tmp_path: Path) -> None:
    write_log(tmp_path / "1", b"x").close()
    (tmp_path / "1").rename(tmp_path / "1.removed")
    (tmp_path / "2.removed").mkdir()
    (tmp_path / "3.removed").write_text("a file")
    kept = KeptOutput(tmp_path)
    assert removed(kept) == [2]
    clear_marks(tmp_path, [JobId(1), JobId(2), JobId(3)])
    assert {path.name for path in tmp_path.iterdir()} == {"1.removed", "3.removed"}
    assert len(list((tmp_path / "1.removed").iterdir())) == 3
