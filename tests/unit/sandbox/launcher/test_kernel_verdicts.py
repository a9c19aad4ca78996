"""Whom the looks at jobs end, and what excuses a job."""

import errno
from types import SimpleNamespace
from typing import cast

import pytest

from jobworker.sandbox.chores import UNENDING
from jobworker.sandbox.kernel_memory.measure import BOUND_BYTES
from jobworker.sandbox.launcher import kernel_verdicts
from jobworker.sandbox.launcher.child import Child
from jobworker.sandbox.launcher.kernel_verdicts import DOUBTS, PIPES, Source, Verdicts

MUCH = BOUND_BYTES + 1
FAILED = {"errno": errno.EINTR, "detail": "the process ended"}


class Judged:
    """Verdicts on two jobs, by ids 1 and 2, and which they have ended."""

    def __init__(self) -> None:
        self.counted = 0, 0
        """What the jobs' groups count in sockets: at most since the last time, and now."""
        self.reads = 0
        self.jobs = {number: self._job(number) for number in (1, 2)}
        self.killed: list[Child] = []
        self.verdicts = Verdicts(lambda: self.jobs, self.killed.append)

    def _job(self, number: int) -> Child:
        scope = SimpleNamespace(sockets_counted=self._read_count)
        return cast("Child", SimpleNamespace(job=number, hoards=False, scope=scope))

    def _read_count(self) -> tuple[int, int]:
        self.reads += 1
        return self.counted

    def doubt(self, source: Source, why: str = "it has too many descriptors") -> None:
        self.verdicts.doubt(1, self.jobs[1], source, why)


@pytest.fixture
def judged() -> Judged:
    return Judged()


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged."""
    logged = list[str]()
    monkeypatch.setattr(kernel_verdicts, "log_line", logged.append)
    return logged


def test_job_is_ended_beyond_the_bound_and_not_at_it(judged: Judged, lines: list[str]) -> None:
    judged.verdicts.end_beyond(judged.jobs[1], BOUND_BYTES)
    assert not judged.killed
    judged.verdicts.end_beyond(judged.jobs[1], MUCH, "in pipes")
    assert judged.killed == [judged.jobs[1]]
    assert judged.jobs[1].hoards
    assert lines == ["job 1 is ended: it holds 64 MiB in pipes"]


def test_doubts_in_a_row_end_a_job(judged: Judged, lines: list[str]) -> None:
    for _ in range(DOUBTS - 1):
        judged.doubt("measurement")
    assert not judged.killed
    assert judged.verdicts.are_pending
    judged.doubt("measurement")
    assert judged.killed == [judged.jobs[1]]
    assert lines[0].endswith(
        "it may hold too much uncounted kernel memory: it has too many descriptors"
    )


def test_clear_look_ends_the_doubts_of_its_own_source_alone(judged: Judged) -> None:
    for source in ("measurement", None):
        for _ in range(DOUBTS - 1):
            judged.doubt(source)
    judged.doubt("measurement", "")
    judged.doubt("measurement")
    assert not judged.killed
    judged.doubt(None)
    assert judged.killed == [judged.jobs[1]]


def test_excuse_is_for_all_doubts_but_those_about_pipes(judged: Judged) -> None:
    for source in ("measurement", PIPES):
        for _ in range(DOUBTS - 1):
            judged.doubt(source)
    judged.verdicts.excuse_all()
    judged.doubt("measurement")
    assert not judged.killed
    judged.doubt(PIPES)
    assert judged.killed == [judged.jobs[1]]


def test_looks_that_fail_in_a_row_end_a_job(judged: Judged) -> None:
    for _ in range(DOUBTS - 1):
        judged.verdicts.failed(1, None, FAILED)
    judged.verdicts.succeeded(1, None)
    judged.verdicts.failed(1, None, FAILED)
    assert not judged.killed
    assert judged.verdicts.are_pending
    for _ in range(DOUBTS - 1):
        judged.verdicts.failed(1, None, FAILED)
    assert judged.killed == [judged.jobs[1]]


@pytest.mark.parametrize(
    "code", [errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC]
)
def test_shortage_on_the_host_counts_against_no_job(judged: Judged, code: int) -> None:
    for _ in range(2 * DOUBTS):
        judged.verdicts.failed(1, None, {"errno": code, "detail": ""})
    assert not judged.killed
    assert not judged.verdicts.are_pending


def test_process_that_cannot_be_ended_ends_its_job_at_once(judged: Judged) -> None:
    judged.verdicts.failed(1, None, {"errno": UNENDING, "detail": ""})
    assert judged.killed == [judged.jobs[1]]


def test_failed_look_at_no_job_or_at_one_that_has_ended_is_passed_over(judged: Judged) -> None:
    for job in (0, 3):
        judged.verdicts.failed(job, None, {"errno": UNENDING, "detail": ""})
    assert not judged.killed
    assert not judged.verdicts.are_pending


def test_state_of_a_job_that_has_ended_is_dropped(judged: Judged) -> None:
    """The next job of the same number, as of a restored history, is not judged by it."""
    for _ in range(DOUBTS - 1):
        judged.doubt(None)
        judged.verdicts.failed(1, None, FAILED)
    judged.counted = MUCH, MUCH
    judged.verdicts.judge_sockets(1, judged.jobs[1], None, MUCH)
    judged.verdicts.forget_all_but([2])
    assert not judged.verdicts.are_pending
    judged.doubt(None)
    assert not judged.killed
    judged.counted = 0, 0
    judged.verdicts.judge_sockets(1, judged.jobs[1], None, MUCH)
    assert judged.killed == [judged.jobs[1]]


# --- sockets that the group counts in part ------------------------------------------------------


def test_what_the_group_counts_is_no_hoard(judged: Judged) -> None:
    judged.counted = MUCH, MUCH
    assert not judged.verdicts.judge_sockets(1, judged.jobs[1], None, MUCH + BOUND_BYTES)
    assert not judged.killed
    judged.verdicts.judge_sockets(1, judged.jobs[1], None, MUCH + MUCH)
    assert judged.killed == [judged.jobs[1]]


def test_little_in_sockets_is_compared_with_no_count(judged: Judged) -> None:
    """To read a count takes the kernel's maximum away."""
    assert not judged.verdicts.judge_sockets(1, judged.jobs[1], None, BOUND_BYTES)
    assert not judged.killed
    assert judged.reads == 0


def test_what_was_counted_since_the_look_began_is_left_out_of_it(judged: Judged) -> None:
    """The sockets may have been full at the look and read since. Then it is to be made again."""
    judged.verdicts.begin("list")
    judged.counted = MUCH, 0
    assert judged.verdicts.judge_sockets(1, judged.jobs[1], "list", MUCH)
    judged.counted = 0, 0
    judged.verdicts.judge_sockets(1, judged.jobs[1], "list", MUCH)
    assert not judged.killed
    judged.verdicts.begin("list")
    judged.verdicts.judge_sockets(1, judged.jobs[1], "list", MUCH)
    assert judged.killed == [judged.jobs[1]]


def test_count_that_one_look_has_read_holds_for_another_that_goes_on(judged: Judged) -> None:
    """Each read takes the kernel's maximum away."""
    judged.verdicts.begin("list")
    judged.verdicts.begin(None, 1)
    judged.counted = MUCH, MUCH
    judged.verdicts.judge_sockets(1, judged.jobs[1], "list", MUCH)
    judged.counted = 0, 0
    judged.verdicts.judge_sockets(1, judged.jobs[1], None, MUCH)
    assert not judged.killed


def test_search_of_one_job_drops_no_count_of_another(judged: Judged) -> None:
    judged.counted = MUCH, MUCH
    for job in (1, 2):
        judged.verdicts.judge_sockets(job, judged.jobs[job], None, MUCH)
    judged.counted = 0, 0
    judged.verdicts.begin(None, 1)
    judged.verdicts.judge_sockets(2, judged.jobs[2], None, MUCH)
    assert not judged.killed
    judged.verdicts.judge_sockets(1, judged.jobs[1], None, MUCH)
    assert judged.killed == [judged.jobs[1]]
