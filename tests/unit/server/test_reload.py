"""What a reload cannot change is named, whatever sections the settings have."""

from attrs import evolve

from jobworker.config import Settings
from jobworker.config_roles import RoleSettings
from jobworker.server.reload import _waiting_for_a_start


def test_nothing_changed_names_nothing() -> None:
    assert _waiting_for_a_start(Settings(), Settings()) == []


def test_each_key_that_waits_for_a_start_is_named_and_no_other() -> None:
    before = Settings()
    now = evolve(
        before,
        worker=evolve(before.worker, max_waiting_jobs=7),
        roles={"x": RoleSettings(operations=())},
        logging=evolve(before.logging, level="DEBUG"),
    )
    assert _waiting_for_a_start(before, now) == ["worker.max_waiting_jobs"]
