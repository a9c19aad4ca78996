"""What a record says of an end: losses of writes, and memory that was short."""

import pytest

from jobworker.jobs.end_words import memory_words, words_of
from jobworker.model.job import KILLED_FOR_MEMORY, LOSSES_UNKNOWN, LOST_WRITES, Usage
from jobworker.model.lifecycle import Reason
from jobworker.sandbox.cgroup.accounting import Want
from jobworker.sandbox.service.job_reports import JobExit


def ended(*, want: Want = "", kills: int | None = 0, **fields: object) -> JobExit:
    usage = None if kills is None else Usage(oom_kills=kills)
    return JobExit(code=0, signal=None, usage=usage, want=want, **fields)  # type: ignore[arg-type]


def test_usual_end_needs_no_words() -> None:
    assert list(words_of(ended(), None)) == []
    assert list(words_of(ended(want="limit"), Reason.OOM)) == [], "its reason says it"


def test_end_with_the_launcher_is_told() -> None:
    assert list(words_of(None, Reason.LOST)) == ["the launcher ended while the job was alive"]


def test_each_place_with_lost_writes_is_named_in_order() -> None:
    assert list(words_of(ended(lost=("", "data"), unseen=("other",)), Reason.DISK)) == [
        f"some of what it wrote to its disk {LOST_WRITES}",
        f"some of what it wrote to the volume data {LOST_WRITES}",
        f"whether all that it wrote to the volume other is kept {LOSSES_UNKNOWN}",
    ]


def test_memory_comes_before_losses() -> None:
    memory, lost = words_of(ended(want="host", kills=1, lost=("",)), None)
    assert KILLED_FOR_MEMORY in memory
    assert LOST_WRITES in lost


@pytest.mark.parametrize(
    ("kills", "reason", "who"),
    [
        (1, None, "1 of its processes was"),
        (2, None, "2 of its processes were"),
        (None, Reason.EXIT, "some of its processes were"),
        (2, Reason.OOM, "it was"),
    ],
)
def test_want_of_memory_of_the_host_says_who_was_killed(
    kills: int | None, reason: Reason | None, who: str
) -> None:
    words = memory_words(ended(want="host", kills=kills), reason)
    assert words.startswith(f"{who} {KILLED_FOR_MEMORY}: the host")


def test_memory_of_the_kernel_is_told_only_where_the_job_ended_by_it() -> None:
    assert "more of the kernel's own" in memory_words(ended(want="kernel"), Reason.OOM)
    assert memory_words(ended(want="kernel"), Reason.EXIT) == ""
