"""A request as the first record and as the launcher's order: defaults, masks and names."""

from datetime import UTC, datetime

import pytest

from jobworker.jobs.orders import first_record, limits_of, order_of
from jobworker.model.job import JobId, JobSpec, Limits
from jobworker.model.lifecycle import State
from jobworker.model.volumes import VolumeMount

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)


@pytest.mark.parametrize(("asked", "expected"), [(None, 60.0), (5.0, 5.0), (0.0, 0.0)])
def test_time_limit_of_the_request_counts_and_0_is_one(
    asked: float | None, expected: float
) -> None:
    spec = JobSpec(command=("true",), timeout_seconds=asked)
    record = first_record(JobId(3), spec, "alice", timeout_seconds=60.0, now=NOON)
    assert record.spec.timeout_seconds == expected
    assert (record.id, record.owner, record.created_at) == (3, "alice", NOON)
    assert record.state is State.PENDING


def test_first_record_masks_secrets_and_keeps_their_names() -> None:
    spec = JobSpec(command=("true",), secret_environment={"TOKEN": "hunter2"})
    record = first_record(JobId(3), spec, "alice", timeout_seconds=0, now=NOON)
    assert list(record.spec.secret_environment) == ["TOKEN"]
    assert "hunter2" not in record.spec.secret_environment.values()
    assert spec.secret_environment == {"TOKEN": "hunter2"}


def test_variables_of_the_request_and_then_its_secrets_replace_others() -> None:
    spec = JobSpec(
        command=("true",), environment={"A": "open", "B": "open", "JOBWORKER_JOB_ID": "mine"}
    )
    order = order_of(spec, JobId(9), {"B": "secret"})
    assert order.environment == {"A": "open", "B": "secret", "JOBWORKER_JOB_ID": "mine"}
    plain = order_of(JobSpec(command=("true",)), JobId(9), {})
    assert plain.environment == {"JOBWORKER_JOB_ID": "9"}
    assert plain.hostname == "job-9"


@pytest.mark.parametrize(("uid", "gid", "expected"), [(7, None, 7), (7, 0, 0), (7, 8, 8)])
def test_group_is_the_user_s_unless_it_is_named(uid: int, gid: int | None, expected: int) -> None:
    order = order_of(JobSpec(command=("true",), uid=uid, gid=gid), JobId(1), {})
    assert (order.uid, order.gid) == (uid, expected)


def test_order_has_all_that_the_start_needs_of_a_request() -> None:
    spec = JobSpec(
        command=("echo", "hi"),
        workdir="/srv",
        network="private",
        runtime="tools",
        volumes=(VolumeMount(name="data", path="/data"), VolumeMount(name="other")),
        init=True,
        limits=Limits(disk_bytes=1 << 30),
    )
    order = order_of(spec, JobId(1), {})
    assert (order.arguments, order.workdir) == (("echo", "hi"), "/srv")
    assert (order.network, order.runtime, order.init) == ("private", "tools", True)
    assert order.volumes == (("data", "/data"), ("other", spec.volumes[1].place))
    assert order.disk_bytes == 1 << 30
    assert order_of(JobSpec(command=("true",)), JobId(1), {}).disk_bytes == 0


def test_limits_go_to_the_control_groups_each_in_its_place() -> None:
    limits = Limits(cpu_percent=50, memory_bytes=1 << 30, io_bps=1 << 20, processes=10)
    scope = limits_of(JobSpec(command=("true",), limits=limits, cpu_cores="0-1"))
    assert (scope.cpu_percent, scope.memory_bytes) == (50, 1 << 30)
    assert (scope.io_bps, scope.pids, scope.cores) == (1 << 20, 10, "0-1")
    none = limits_of(JobSpec(command=("true",)))
    assert (none.cpu_percent, none.memory_bytes, none.io_bps, none.pids) == (0, 0, 0, 0)
