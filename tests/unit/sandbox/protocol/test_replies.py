"""What the service accepts as values of the launcher's replies."""

import pytest

from jobworker.sandbox.cgroup.accounting import ScopeUsage
from jobworker.sandbox.protocol import replies as a
from jobworker.sandbox.protocol.end_requests import EndRequestReport
from jobworker.sandbox.protocol.fields import Malformed, Object, decode, encode
from jobworker.storage import MAX_DISK_BYTES, MIN_DISK_BYTES

VOLUME = {"name": "data", "size_bytes": MIN_DISK_BYTES}
ENDED = {"code": None, "signal": 9}
JOB = {"job": 3, "pid": 20, "age_seconds": 7.5, "exit": None}


def volumes(**changes: object) -> a.VolumeEntries:
    return decode(a.VolumeEntries, a.VOLUMES, {"volumes": [{**VOLUME, **changes}]})


def jobs(**changes: object) -> a.JobEntries:
    return decode(a.JobEntries, a.JOBS, {"jobs": [{**JOB, **changes}], "more": False})


@pytest.mark.parametrize("name", ["", "../etc", "a/b", ".hidden", "x" * 300, "two words"])
def test_name_that_no_volume_can_have_is_refused(name: str) -> None:
    with pytest.raises(Malformed, match="name is no name of a volume"):
        volumes(name=name)


@pytest.mark.parametrize("size", [MIN_DISK_BYTES - 1, MAX_DISK_BYTES + 1])
def test_size_that_no_volume_can_have_is_refused(size: int) -> None:
    assert volumes(size_bytes=MAX_DISK_BYTES).volumes[0].size_bytes == MAX_DISK_BYTES
    with pytest.raises(Malformed, match="size_bytes is no integer from"):
        volumes(size_bytes=size)


@pytest.mark.parametrize("name", ["used_bytes", "jobs"])
def test_count_of_a_volume_is_never_negative(name: str) -> None:
    with pytest.raises(Malformed, match=f"{name} is no integer from 0"):
        volumes(**{name: -1})


def test_volume_of_an_earlier_launcher_is_empty_and_in_use_by_no_job() -> None:
    assert volumes() == a.VolumeEntries((a.VolumeEntry("data", MIN_DISK_BYTES, 0, False, 0),))


def test_steps_come_as_three_words_each() -> None:
    assert decode(a.Steps, a.STEPS, {"steps": [["a", "b", "c"]]}) == a.Steps((("a", "b", "c"),))
    for step in (["a", "b"], ["a", "b", "c", "d"]):
        with pytest.raises(Malformed, match="a step that is not of three words"):
            decode(a.Steps, a.STEPS, {"steps": [step]})
    for wrong in (["a", "b", 3], "abc"):
        with pytest.raises(Malformed, match="steps is no"):
            decode(a.Steps, a.STEPS, {"steps": [wrong]})


@pytest.mark.parametrize(
    ("told", "want"), [({}, None), ({"want": None}, None), ({"want": 5}, None), ({"want": ""}, "")]
)
def test_want_of_memory_is_unknown_unless_it_is_a_word(told: Object, want: str | None) -> None:
    assert decode(a.HowEnded, a.HOW_ENDED, {**ENDED, **told}) == a.HowEnded(None, 9, (), (), want)


@pytest.mark.parametrize("told", [{}, {"why": None}, {"why": 5}])
def test_refusal_without_more_about_its_reason_has_none(told: Object) -> None:
    refusal = {"step": "disk", "errno": 28, "detail": "full", **told}
    assert decode(a.Refusal, a.REFUSAL, refusal) == a.Refusal("disk", 28, "full", "")
    refusal["why"] = "2 MB are free"
    assert decode(a.Refusal, a.REFUSAL, refusal).why == "2 MB are free"


def test_counters_that_an_earlier_launcher_does_not_have_are_zero() -> None:
    assert decode(ScopeUsage, a.USAGE, {"pids": 4}) == ScopeUsage(pids=4)
    with pytest.raises(Malformed, match="cpu_ns is no integer"):
        decode(ScopeUsage, a.USAGE, {"cpu_ns": 0.5})
    assert set(encode(a.USAGE, ScopeUsage())) == set(ScopeUsage._fields)


def test_job_of_an_earlier_launcher_is_taken_over_with_defaults() -> None:
    entry = a.JobEntry(3, 20, 7.5, 0.0, None, ScopeUsage(), True, "", None)
    assert jobs() == a.JobEntries((entry,), more=False, unstarted=())


def test_end_that_was_asked_for_comes_with_its_signals() -> None:
    asked = {"cause": "stop", "seconds_ago": 1, "kill_in_seconds": -2.5, "signals": [15, 9]}
    assert jobs(asked=asked).jobs[0].asked == EndRequestReport("stop", 1, -2.5, (15, 9))
    assert jobs(asked=None).jobs[0].asked is None
    with pytest.raises(Malformed, match="signals is no integer"):
        jobs(asked={**asked, "signals": ["TERM"]})


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"exit": {"code": None}}, "signal is no integer"),
        ({"exit": {"signal": 9}}, "code is no integer"),
        ({"exit": {**ENDED, "lost": [5]}}, "lost is no text"),
        ({"age_seconds": float("inf")}, "age_seconds is no finite number"),
        ({"measured": 1}, "measured is neither true nor false"),
        ({"network_end": None}, "network_end is no text"),
    ],
)
def test_value_of_a_job_that_does_not_fit_is_refused_by_name(
    told: dict[str, object], words: str
) -> None:
    with pytest.raises(Malformed, match=words):
        jobs(**told)
