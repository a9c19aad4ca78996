"""The gate: a job that a call names is looked up, wherever in the parameters it stands."""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime

import attrs
import pytest

from jobworker.errors import NotFound, PermissionDenied
from jobworker.model.access import Permission, Role, Roles, Scope, no_such_job
from jobworker.model.job import JobId, JobRecord, JobSpec
from jobworker.model.volumes import VolumeMount
from jobworker.pki.identity import Identity
from jobworker.protocol import messages as m
from jobworker.protocol.methods import METHODS, Method
from jobworker.server.access import authorization
from jobworker.server.access.authorization import Authorization, jobs_named

from ...strategies import record


@attrs.frozen
class Inner:
    job: JobId


@attrs.frozen
class Params:
    inner: Inner
    plain: int = 7
    maybe: JobId | None = None
    many: tuple[JobId, ...] = ()
    maybe_many: tuple[Inner, ...] | None = None
    by_name: Mapping[str, JobId] = attrs.field(factory=dict)


def test_jobs_are_found_at_whatever_depth() -> None:
    params = Params(
        inner=Inner(JobId(1)),
        maybe=JobId(2),
        many=(JobId(3), JobId(4)),
        maybe_many=(Inner(JobId(5)),),
        by_name={"x": JobId(6)},
    )
    assert sorted(jobs_named(params)) == [1, 2, 3, 4, 5, 6]
    assert list(jobs_named(Params(inner=Inner(JobId(1))))) == [1]


def test_number_that_names_no_job_is_passed_over() -> None:
    assert list(jobs_named(m.ListParams(before=5))) == []


def test_large_request_is_not_walked_value_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[object] = []
    named = authorization._named

    def count(kind: object, value: object) -> Iterator[JobId]:
        looked.append(kind)
        return named(kind, value)

    monkeypatch.setattr(authorization, "_named", count)
    spec = JobSpec(command=("a",) * 10_000, environment={f"V{n}": "x" for n in range(45_000)})
    assert list(jobs_named(m.RunParams(job=spec))) == []
    assert len(looked) < 100


def identity(name: str, role: str) -> Identity:
    return Identity(common_name=name, role=role, serial="01", not_after=datetime.now(UTC))


JOBS = {1: record(1, owner="alice"), 2: record(2, owner="bob")}


async def find(job: JobId) -> JobRecord:
    if job not in JOBS:
        raise no_such_job(job)
    return JOBS[job]


GATE = Authorization(
    Roles.with_own(
        Role(name="tenant", permissions=frozenset(Permission), scope=Scope.OWN),
        Role(name="blind", permissions=frozenset(), scope=Scope.ALL),
        Role(name="runner", permissions=frozenset({Permission.RUN}), scope=Scope.ALL),
    ),
    longest_seconds=3600,
)
TAKES_A_JOB = [row for row in METHODS.values() if row.params is m.JobParams]


@pytest.mark.parametrize("row", TAKES_A_JOB, ids=lambda row: row.name)
@pytest.mark.parametrize("name", ["bob", "Alice", "alice ", "аlice"])  # noqa: RUF001
async def test_job_of_another_name_does_not_exist(row: Method, name: str) -> None:
    await GATE.check_call(identity("alice", "tenant"), row, m.JobParams(id=JobId(1)), find)
    with pytest.raises(NotFound) as hidden:
        await GATE.check_call(identity(name, "tenant"), row, m.JobParams(id=JobId(1)), find)
    with pytest.raises(NotFound) as missing:
        await GATE.check_call(identity(name, "tenant"), row, m.JobParams(id=JobId(9)), find)
    assert str(hidden.value).replace("1", "9") == str(missing.value)
    assert hidden.value.data == missing.value.data


@pytest.mark.parametrize("row", METHODS.values(), ids=lambda row: row.name)
async def test_permission_is_asked_for_before_any_job_is_looked_up(row: Method) -> None:
    async def never(_: JobId) -> JobRecord:
        raise AssertionError("a job was looked up")

    with pytest.raises(PermissionDenied):
        await GATE.check_call(identity("eve", "blind"), row, m.JobParams(id=JobId(1)), never)


@pytest.mark.parametrize(
    ("params", "lacking"),
    [
        (m.RunParams(job=JobSpec(command=("true",)), follow=m.Delivery()), "log"),
        (m.RunParams(job=JobSpec(command=("true",), timeout_seconds=0)), "unbounded"),
        (m.RunParams(job=JobSpec(command=("true",), timeout_seconds=3601)), "unbounded"),
        (
            m.RunParams(job=JobSpec(command=("true",), volumes=(VolumeMount(name="shared"),))),
            "volumes",
        ),
        (m.PlanParams(job=JobSpec(command=("true",), timeout_seconds=0)), "unbounded"),
    ],
)
async def test_what_parameters_ask_for_is_asked_of_the_role(params: object, lacking: str) -> None:
    row = next(row for row in METHODS.values() if row.params is type(params))
    with pytest.raises(PermissionDenied, match=f"cannot call {row.name} with") as denied:
        await GATE.check_call(identity("eve", "runner"), row, params, find)
    assert f"it lacks the permission {lacking!r}" in denied.value.message
    await GATE.check_call(identity("root", "admin"), row, params, find)
