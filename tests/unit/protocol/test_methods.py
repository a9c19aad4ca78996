"""The catalogue: sound rows, each with its operation."""

from typing import get_args

import attrs
import pytest

from jobworker.model.access import Permission
from jobworker.model.job import JobId, JobSpec
from jobworker.model.volumes import VolumeMount
from jobworker.protocol import messages as m
from jobworker.protocol.methods import METHODS
from jobworker.server.requests.operations import OPERATIONS


def test_every_row_has_its_operation_and_every_operation_its_row() -> None:
    assert set(OPERATIONS) == set(METHODS)


def test_rows_stand_under_their_own_names() -> None:
    assert {name: row.name for name, row in METHODS.items()} == {name: name for name in METHODS}


def test_parameters_and_results_are_frozen_classes_of_the_wire() -> None:
    for row in METHODS.values():
        for cls in (row.params, row.result):
            assert attrs.has(cls)
            assert cls.__module__.startswith("jobworker.")
            assert cls.__setattr__ is not object.__setattr__


def test_what_changes_a_job_needs_more_than_looking() -> None:
    needed = {name: row.permission for name, row in METHODS.items()}
    assert needed.pop("job.run") is Permission.RUN
    assert needed.pop("job.plan") is Permission.RUN
    assert needed.pop("job.stop") is Permission.STOP
    assert needed.pop("job.log") is Permission.LOG
    assert needed.pop("job.remove") is Permission.REMOVE
    assert needed.pop("job.prune") is Permission.REMOVE
    for name in ("create", "list", "remove"):
        assert needed.pop(f"volume.{name}") is Permission.VOLUMES
    assert set(needed.values()) == {Permission.VIEW}


WEEK = 7 * 86_400.0


def needs_of(method: str, *, follow: bool = False, **job: object) -> dict[Permission, str]:
    spec = JobSpec(command=("true",), **job)  # type: ignore[arg-type]
    params = (
        m.RunParams(job=spec, follow=m.Delivery() if follow else None)
        if method == "job.run"
        else m.PlanParams(job=spec)
    )
    return dict(METHODS[method].needs(params, WEEK))


@pytest.mark.parametrize("method", ["job.run", "job.plan"])
def test_usual_job_needs_the_methods_own_permission_alone(method: str) -> None:
    for seconds in (None, 1, WEEK):
        assert needs_of(method, timeout_seconds=seconds) == {Permission.RUN: method}


@pytest.mark.parametrize("method", ["job.run", "job.plan"])
def test_time_limit_beyond_the_longest_needs_more(method: str) -> None:
    for seconds, what in ((0, "without a time limit"), (WEEK + 1, "of more than 7d")):
        needed = needs_of(method, timeout_seconds=seconds)
        assert set(needed) == {Permission.RUN, Permission.UNBOUNDED}
        assert needed[Permission.UNBOUNDED].startswith(method)
        assert what in needed[Permission.UNBOUNDED]


def test_what_a_run_asks_for_besides_needs_more() -> None:
    volumes = (VolumeMount(name="shared"),)
    assert needs_of("job.run", follow=True) == {
        Permission.RUN: "job.run",
        Permission.LOG: "job.run with follow",
    }
    for method in ("job.run", "job.plan"):  # a plan refuses what a run would
        assert needs_of(method, volumes=volumes) == {
            Permission.RUN: method,
            Permission.VOLUMES: f"{method} with volumes",
        }


def test_removal_of_what_may_be_alive_is_a_stop_besides() -> None:
    row = METHODS["job.remove"]
    for force, stop in ((False, {}), (True, {Permission.STOP: "job.remove with force"})):
        needed = dict(row.needs(m.RemoveParams(id=JobId(1), force=force), WEEK))
        assert needed == {Permission.REMOVE: "job.remove", **stop}


def test_results_that_tell_of_a_subscription_are_known_to_open_one() -> None:
    telling = {row.result for row in METHODS.values() if hasattr(row.result, "subscription")}
    assert telling == set(get_args(m.Opening))


def test_rows_have_summaries_of_one_line() -> None:
    for row in METHODS.values():
        assert row.summary[0].isupper()
        assert "\n" not in row.summary
