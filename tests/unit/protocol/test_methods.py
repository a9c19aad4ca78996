"""The catalogue: sound rows, each with its operation."""

import attrs

from jobworker.model.access import Permission
from jobworker.protocol.methods import METHODS
from jobworker.server.operations import OPERATIONS


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


def test_rows_have_summaries_of_one_line() -> None:
    for row in METHODS.values():
        assert row.summary[0].isupper()
        assert "\n" not in row.summary
