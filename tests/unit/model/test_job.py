"""What a job is: bounds on a request, and how its end is told."""

import contextlib
import signal
from collections.abc import Callable

import attrs
import pytest
from hypothesis import given

from jobworker.errors import InvalidParams, TooLarge
from jobworker.model import job
from jobworker.model.job import (
    LOST_WRITES,
    JobRecord,
    JobSpec,
    Limits,
    parse_signal,
    shell_exit_code,
)
from jobworker.model.lifecycle import TERMINAL, Reason, State

from ..strategies import any_text, examples, limits, record, records, specs


@pytest.mark.parametrize(
    ("state", "reason", "exit_code", "number", "expected"),
    [
        (State.COMPLETED, None, 0, None, 0),
        (State.FAILED, Reason.EXIT, 3, None, 3),
        (State.FAILED, Reason.EXIT, 255, None, 255),
        (State.FAILED, Reason.SIGNAL, None, 11, 139),
        (State.FAILED, Reason.TIMEOUT, None, 9, 124),
        (State.FAILED, Reason.TIMEOUT, 0, None, 124),
        (State.FAILED, Reason.OOM, None, 9, 137),
        (State.FAILED, Reason.OOM, 1, None, 137),
        (State.FAILED, Reason.START, 127, None, 127),
        (State.FAILED, Reason.START, 126, None, 126),
        (State.FAILED, Reason.START, None, None, 125),
        (State.FAILED, Reason.LOST, None, None, 125),
        (State.STOPPED, None, None, 15, 143),
        (State.STOPPED, None, None, 9, 137),
        (State.STOPPED, None, 0, None, 0),
        (State.STOPPED, None, None, None, 125),
    ],
)
def test_end_is_told_as_a_shell_would(
    state: State, reason: Reason | None, exit_code: int | None, number: int | None, expected: int
) -> None:
    ended = record(1, state, reason=reason, exit_code=exit_code, signal=number)
    assert shell_exit_code(ended) == expected


@pytest.mark.parametrize(
    ("state", "reason", "exit_code", "expected"),
    [
        (State.FAILED, Reason.DISK, 0, 74),
        (State.STOPPED, None, 0, 74),
        (State.FAILED, Reason.EXIT, 3, 3),
    ],
)
def test_end_with_0_over_lost_writes_is_told_as_a_fault(
    state: State, reason: Reason | None, exit_code: int, expected: int
) -> None:
    ended = record(1, state, reason=reason, exit_code=exit_code, detail=f"it {LOST_WRITES}")
    assert shell_exit_code(ended) == expected


@pytest.mark.parametrize("state", State)
def test_job_has_ended_in_terminal_states_alone(state: State) -> None:
    assert record(1, state).ended == (state in TERMINAL)


@pytest.mark.parametrize("name", ["TERM", "SIGTERM", "term", "sigterm", "15", "015"])
def test_signal_is_named_as_kill_names_it(name: str) -> None:
    assert parse_signal(name) is signal.SIGTERM


@pytest.mark.parametrize(
    "name",
    [
        "",
        "0",
        "65",
        "-15",
        "+15",
        " TERM",
        "TERM ",
        "TERMX",
        "SIGSIGTERM",
        "15.0",
        "¹⁵",
        "٩",
        "_",
        "SIG",
        "DFL",
        "IGN",
        "_DFL",
        "9" * 5000,
    ],
)
def test_what_names_no_signal_is_refused(name: str) -> None:
    with pytest.raises(InvalidParams, match="no such signal"):
        parse_signal(name)


@examples(max_examples=200)
@given(any_text)
def test_any_name_is_a_signal_or_refused(name: str) -> None:
    with contextlib.suppress(InvalidParams):
        assert isinstance(parse_signal(name), signal.Signals)


BAD: dict[str, Callable[[], JobSpec]] = {
    "is empty": lambda: JobSpec(command=()),
    "name the program to run": lambda: JobSpec(command=("", "x")),
    "argument 1 contains a NUL": lambda: JobSpec(command=("a", "b\0c")),
    "argument 0 contains a NUL": lambda: JobSpec(command=("\0",)),
    "at most 16384 are allowed": lambda: JobSpec(command=("a",) * (job.MAX_ARGUMENTS + 1)),
    "argument 1 has 131072 bytes": lambda: JobSpec(command=("a", "é" * 65_536)),
    "'' is not a name for a variable": lambda: JobSpec(command=("a",), environment={"": "x"}),
    "'1A' is not a name": lambda: JobSpec(command=("a",), environment={"1A": "x"}),
    "'A=B' is not a name": lambda: JobSpec(command=("a",), environment={"A=B": "x"}),
    "'A-B' is not a name": lambda: JobSpec(command=("a",), environment={"A-B": "x"}),
    r"'A\\n' is not a name": lambda: JobSpec(command=("a",), environment={"A\n": "x"}),
    "'Ä' is not a name": lambda: JobSpec(command=("a",), environment={"Ä": "x"}),
    "the variable A contains a NUL": lambda: JobSpec(command=("a",), environment={"A": "\0"}),
    "the variable A has 131072 bytes": lambda: JobSpec(
        command=("a",), environment={"A": "x" * 131_070}
    ),
    "must be an absolute path": lambda: JobSpec(command=("a",), workdir="tmp"),
    "the path contains a NUL": lambda: JobSpec(command=("a",), workdir="/tmp\0"),
    "at most 128 printable": lambda: JobSpec(command=("a",), name="x" * 129),
    "128 printable": lambda: JobSpec(command=("a",), name="a\x1b[2J"),
    "must be from 0 to 3153": lambda: JobSpec(command=("a",), timeout_seconds=-1),
    "must be a finite number": lambda: JobSpec(command=("a",), timeout_seconds=float("nan")),
}


@pytest.mark.parametrize("told", BAD)
def test_request_out_of_bounds_is_refused(told: str) -> None:
    with pytest.raises(ValueError, match=told):
        BAD[told]()


def test_request_at_its_bounds_is_taken() -> None:
    JobSpec(command=("a",) * job.MAX_ARGUMENTS)
    JobSpec(command=("a", "", "é" * 65_535 + "x"))
    JobSpec(command=("a",), environment={"A": "x" * (131_071 - 2), "_1": "", "a9": "="})
    JobSpec(command=("a",), workdir="/", name="x" * 128, timeout_seconds=0)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("cpu_percent", 1, 819_200),
        ("memory_bytes", 4 << 20, 1 << 50),
        ("io_bps", 4096, 1 << 50),
        ("processes", 1, 4_194_304),
    ],
)
def test_limit_is_none_zero_or_within_its_bounds(name: str, low: int, high: int) -> None:
    for sound in (None, 0, low, high):
        assert getattr(Limits(**{name: sound}), name) == sound
    for bad in (-1, low - 1 or -2, high + 1):
        with pytest.raises(ValueError, match="must be 0"):
            Limits(**{name: bad})


@examples(max_examples=100)
@given(limits, limits)
def test_default_stands_in_for_none_and_not_for_zero(mine: Limits, defaults: Limits) -> None:
    merged = attrs.asdict(mine.or_defaults(defaults))
    for name, value in attrs.asdict(mine).items():
        assert merged[name] == (attrs.asdict(defaults)[name] if value is None else value)


def test_arguments_and_environment_count_together() -> None:
    piece = "x" * 100_000
    fits = JobSpec(command=(piece,) * 5, environment={f"V{n}": piece for n in range(5)})
    fits.check_size()
    too_much = JobSpec(command=(piece,) * 6, environment={f"V{n}": piece for n in range(5)})
    with pytest.raises(TooLarge, match="at most 1048576 are allowed"):
        too_much.check_size()


def test_variables_of_both_environments_are_counted() -> None:
    """The launcher checks them all in one turn of its loop, whatever their size."""
    most = {f"V{number}": "" for number in range(job.MAX_VARIABLES)}
    JobSpec(command=("true",), environment=most, secret_environment={"V0": "x"}).check_size()
    too_many = JobSpec(command=("true",), environment=most, secret_environment={"W": "x"})
    with pytest.raises(TooLarge, match="has 49153 variables, at most 49152 are allowed"):
        too_many.check_size()


def test_size_counts_a_byte_for_each_end_and_equals_sign() -> None:
    name = {"V": "é"}  # "V=é\0" has 5 bytes
    last = "x" * (job.MAX_ARGUMENTS_BYTES - 8 * 131_000 - 5 - 1)
    words = ("x" * 130_999,) * 8
    JobSpec(command=(*words, last), environment=name).check_size()
    with pytest.raises(TooLarge):
        JobSpec(command=(*words, last + "x"), environment=name).check_size()


@examples(max_examples=50)
@given(records)
def test_masked_record_hides_values_of_variables_and_nothing_else(stored: JobRecord) -> None:
    masked = stored.masked()
    assert masked.spec.environment == dict.fromkeys(stored.spec.environment, job.MASK)
    assert attrs.evolve(masked, spec=stored.spec) == stored
    unmasked = attrs.evolve(masked.spec, environment=stored.spec.environment)
    assert unmasked == stored.spec


@examples(max_examples=50)
@given(specs)
def test_request_cannot_be_changed(spec: JobSpec) -> None:
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        spec.workdir = "/etc"  # type: ignore[misc]
