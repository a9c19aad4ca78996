"""Labels: what is one, and what is refused by name."""

import pytest
from attrs import evolve
from hypothesis import given

from jobworker.model.job import MASK, JobSpec
from jobworker.model.labels import MAX_LABELS, check_labels

from ..strategies import examples, labels, specs


@examples(max_examples=100)
@given(labels)
def test_labels_of_the_form_are_taken(some: dict[str, str]) -> None:
    check_labels(None, None, some)


@pytest.mark.parametrize(
    "name", ["", "-a", "a-", "a b", "a=b", 'a"b', "a$", "é", ".", "x" * 64, "a\n", "a\0"]
)
def test_name_of_another_form_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match="is not a name for a label"):
        JobSpec(command=("true",), labels={name: "x"})


@pytest.mark.parametrize("value", ["x" * 256, "a\nb", "\x1b[31m", "a\0"])
def test_value_that_is_no_short_line_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="the value of team must be"):
        JobSpec(command=("true",), labels={"team": value})


def test_number_of_labels_is_bounded() -> None:
    many = {f"l{number}": "" for number in range(MAX_LABELS + 1)}
    with pytest.raises(ValueError, match="at most 64"):
        check_labels(None, None, many)


@examples(max_examples=100)
@given(specs)
def test_nothing_but_secrets_is_masked_for_the_records(spec: JobSpec) -> None:
    shown = spec.without_secrets()
    assert set(shown.secret_environment) == set(spec.secret_environment)
    assert set(shown.secret_environment.values()) <= {MASK}
    assert evolve(shown, secret_environment=spec.secret_environment) == spec


def test_secrets_are_in_no_repr() -> None:
    assert "hunter2" not in repr(JobSpec(command=("a",), secret_environment={"TOKEN": "hunter2"}))
