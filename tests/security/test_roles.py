"""A viewer tries every operation; a tenant tries every operation on another's job.

Both go through the catalogue row by row, so that an operation which is added to it is tried too.
The control: the job's owner and the admin get an answer where the attacker gets none.
"""

import json
import typing
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path

import attrs
import pytest

from jobworker.cli.worker.embedded_service import EmbeddedService
from jobworker.errors import NotFound, PermissionDenied
from jobworker.model.access import BUILT_IN, Permission
from jobworker.model.job import JobId, JobSpec
from jobworker.pki.administration import init_authority
from jobworker.pki.authority import Authority
from jobworker.pki.files import write_new
from jobworker.protocol.methods import METHODS, Method

from ..integration.test_takeover import until_bigger
from ..integration.wire import Refused, Wire, open_wire
from ..services import open_embedded
from .conftest import ROLES

NAMES_NO_JOB = {
    *("volume.create", "volume.list", "volume.remove"),
    "job.plan",
    "service.hello",
    "job.run",
    "job.list",
    "job.prune",
    "job.credit",
    "job.unfollow",
}
"""Methods that take no job's id. Before one is added here it must be told below (or in a test of
its own) how it keeps from its caller what is another tenant's."""
NEVER = 999_999_999


def sample(cls: type, job: int) -> dict[str, object]:
    """The least parameters that `cls` takes, with `job` in every place of a job's id."""
    made = {}
    for place in attrs.fields(cls):
        kind = place.type
        if _takes_job(kind):
            made[place.name] = _with_job(kind, job)
        elif place.default is attrs.NOTHING:
            made[place.name] = 1 << 24 if place.name == "size_bytes" else _plain(kind)
    return made


def _takes_job(kind: object) -> bool:
    if isinstance(kind, type) and attrs.has(kind):
        return any(_takes_job(place.type) for place in attrs.fields(kind))
    return kind is JobId or any(_takes_job(inner) for inner in typing.get_args(kind))


def _with_job(kind: object, job: int) -> object:
    if kind is JobId:
        return job
    if isinstance(kind, type) and attrs.has(kind):
        return sample(kind, job)
    (inner,) = [each for each in typing.get_args(kind) if _takes_job(each)]
    return [_with_job(inner, job)] if typing.get_origin(kind) is tuple else _with_job(inner, job)


def _plain(kind: object) -> object:
    if kind is JobSpec:
        return {"command": ["true"]}
    if isinstance(kind, type) and attrs.has(kind):
        return sample(kind, NEVER)
    return {int: 1, str: "x", float: 1.0, bool: False}.get(kind, [])  # type: ignore[call-overload]


TOUCHES_A_JOB = [row for row in METHODS.values() if _takes_job(row.params)]


def test_every_method_names_a_job_or_is_known_to_name_none() -> None:
    rest = set(METHODS) - {row.name for row in TOUCHES_A_JOB} - {"rpc.discover"}
    assert rest == NAMES_NO_JOB


@pytest.fixture
async def alice(tenants: EmbeddedService) -> AsyncIterator[Wire]:
    async with open_wire(tenants, "alice") as wire:
        yield wire


@pytest.fixture
async def bob(tenants: EmbeddedService) -> AsyncIterator[Wire]:
    async with open_wire(tenants, "bob") as wire:
        yield wire


async def refusal(wire: Wire, method: str, params: dict[str, object]) -> Refused:
    with pytest.raises(Refused) as refused:
        await wire.call(method, **params)
    return refused.value


@pytest.mark.parametrize("row", TOUCHES_A_JOB, ids=lambda row: row.name)
async def test_tenant_finds_no_job_of_another(
    tenants: EmbeddedService, alice: Wire, bob: Wire, row: Method
) -> None:
    running = await alice.start("sleep", "600")
    _, _, ended = await alice.run("echo", "mine")
    for job in (running, int(str(ended["id"]))):
        mine = await refusal(bob, row.name, sample(row.params, job))
        never = await refusal(bob, row.name, sample(row.params, NEVER))
        assert mine.code == never.code == NotFound.code
        # What does not exist and what is another's are one and the same.
        assert mine.message.replace(str(job), "#") == never.message.replace(str(NEVER), "#")
        assert json.dumps(mine.data) == json.dumps(never.data)
    assert (await alice.call("job.status", id=running))["state"] == "RUNNING"
    assert (await alice.call("job.stop", id=running))["state"] == "STOPPED"


async def test_tenant_sees_no_job_of_another_in_lists(
    tenants: EmbeddedService, alice: Wire, bob: Wire
) -> None:
    hers, his = await alice.start("sleep", "600"), await bob.start("true")
    await bob.call("job.wait", id=his)
    async with open_wire(tenants, "olga") as olga, open_wire(tenants) as admin:
        for wire, owners in (
            (alice, {"alice"}),
            (bob, {"bob"}),
            (olga, {"alice", "bob"}),
            (admin, {"alice", "bob"}),
        ):
            jobs = (await wire.call("job.list"))["jobs"]
            assert isinstance(jobs, list)
            assert {job["owner"] for job in jobs} >= owners
            if len(owners) == 1:
                assert {job["owner"] for job in jobs} == owners
        page = await bob.call("job.list", before=hers + 1)
        assert hers not in [job["id"] for job in page["jobs"]]  # type: ignore[attr-defined]
        assert (await olga.call("job.stop", id=hers))["state"] == "STOPPED"


async def test_tenant_prunes_no_output_of_another(alice: Wire, bob: Wire) -> None:
    _, _, hers = await alice.run("echo", "hers")
    _, _, his = await bob.run("echo", "his")
    await bob.call("job.prune", older_than_seconds=0, keep_jobs=0, keep_bytes=0)
    opened = await alice.call("job.log", id=hers["id"])
    assert (await alice.output(opened["subscription"]))[0] == b"hers\n"
    await refusal(bob, "job.log", {"id": his["id"]})  # the control


async def test_subscription_belongs_to_its_connection(
    tenants: EmbeddedService, alice: Wire, bob: Wire
) -> None:
    job = await alice.start("sh", "-c", "echo said; sleep 600")
    await until_bigger(alice, job, 0)
    number = (await alice.call("job.log", id=job))["subscription"]
    await refusal(bob, "job.credit", {"subscription": number, "bytes": 1})
    await bob.call("job.unfollow", subscription=number)
    await alice.call("job.credit", subscription=number, bytes=1)
    await alice.call("job.stop", id=job)
    assert (await alice.output(number))[0] == b"said\n"


async def test_two_certificates_of_one_name_are_one_tenant(
    tenants: EmbeddedService, alice: Wire
) -> None:
    """The name decides and not the serial; another role of the same name is still that name."""
    job = await alice.start("sleep", "600")
    async with open_wire(tenants, "alice") as again:
        assert (await again.call("job.stop", id=job))["owner"] == "alice"


@pytest.mark.parametrize("who", ["viewer", "carol", "rita", "olga"])
async def test_role_is_held_to_its_operations(tenants: EmbeddedService, who: str) -> None:
    """Every row of the catalogue, by who may do little."""
    held = {
        "viewer": BUILT_IN[1].permissions,
        "carol": {Permission.VIEW, Permission.LOG},
        "rita": {Permission.RUN},
        "olga": {Permission.VIEW, Permission.STOP},
    }[who]
    async with open_wire(tenants, who) as wire:
        for row in METHODS.values():
            try:
                await wire.call(row.name, **sample(row.params, NEVER))
                denied = False
            except Refused as refused:
                denied = refused.code == PermissionDenied.code
            assert denied == (row.permission not in held), row.name


def asking_for_more(row: Method, job: int) -> list[tuple[dict[str, object], set[Permission]]]:
    """Parameters of a method that ask for more than its row's own permission, and for what."""
    command: dict[str, object] = {"command": ["true"]}
    volumes: dict[str, object] = {"job": {**command, "volumes": [{"name": "nobodys"}]}}
    endless: dict[str, object] = {"job": {**command, "timeout_seconds": 0}}
    asks: dict[str, list[tuple[dict[str, object], set[Permission]]]] = {
        "job.run": [
            ({"job": command, "follow": {}}, {Permission.LOG}),
            (endless, {Permission.UNBOUNDED}),
            (volumes, {Permission.VOLUMES}),
        ],
        "job.plan": [(endless, {Permission.UNBOUNDED}), (volumes, {Permission.VOLUMES})],
        "job.remove": [({"id": job, "force": True}, {Permission.STOP})],
    }
    return asks.get(row.name, [])


@pytest.mark.parametrize("who", ["viewer", "carol", "rita", "olga", "rosa"])
async def test_role_is_held_to_what_its_parameters_ask_for(
    tenants: EmbeddedService, who: str
) -> None:
    """Every condition of the catalogue, by those who hold the method's own permission or not."""
    view, run = Permission.VIEW, Permission.RUN
    held = {
        "viewer": {view, Permission.LOG},
        "carol": {view, Permission.LOG},
        "rita": {run},
        "olga": {view, Permission.STOP},
        "rosa": {view, run, Permission.REMOVE},
    }[who]
    async with open_wire(tenants) as admin, open_wire(tenants, who) as wire:
        live = await admin.start("sleep", "600")
        for row in METHODS.values():
            asked = asking_for_more(row, live)
            assert {need for _, needs in asked for need in needs} == {
                condition.permission for condition in row.conditions
            }, "this test tries each condition"
            for params, needs in asked:
                denied = await refusal(wire, row.name, params)
                missing = {row.permission, *needs} - held
                assert (denied.code == PermissionDenied.code) == bool(missing), (row.name, params)
        assert (await admin.call("job.status", id=live))["state"] == "RUNNING"
        await admin.call("job.remove", id=live, force=True)


async def test_running_with_its_output_needs_both(tenants: EmbeddedService) -> None:
    async with open_wire(tenants, "rita") as rita:
        job = {"command": ["echo", "secret"]}
        denied = await refusal(rita, "job.run", {"job": job, "follow": {}})
        assert denied.code == PermissionDenied.code
        assert "log" in denied.message
        assert (await rita.call("job.run", job=job))["subscription"] is None


async def test_no_time_limit_is_for_who_may_ask_for_it(
    tenants: EmbeddedService, alice: Wire
) -> None:
    week = 7 * 86400
    async with open_wire(tenants) as admin:
        for seconds in (0, week + 1, 10 * 365 * 86400):
            job = {"command": ["true"], "timeout_seconds": seconds}
            for method in ("job.run", "job.plan"):
                denied = await refusal(alice, method, {"job": job})
                assert denied.code == PermissionDenied.code
                assert "unbounded" in denied.message
            await admin.call("job.run", job=job)
    await alice.call("job.run", job={"command": ["true"], "timeout_seconds": week})


async def test_volumes_are_for_those_who_reach_all_jobs(
    tenants: EmbeddedService, alice: Wire
) -> None:
    """All share them, so a tenant has none, whatever operations its role holds."""
    size = 16 << 20
    async with open_wire(tenants, "admin") as admin:
        await admin.call("volume.create", name="shared", size_bytes=size)
        for method, params in {
            "volume.list": {},
            "volume.create": {"name": "mine", "size_bytes": size},
            "volume.remove": {"name": "shared"},
            "job.run": {"job": {"command": ["true"], "volumes": [{"name": "shared"}]}},
        }.items():
            with pytest.raises(Refused) as refused:
                await alice.call(method, **params)  # type: ignore[arg-type]
            assert refused.value.code == PermissionDenied.code, method
        await admin.call("volume.remove", name="shared")


async def test_default_of_no_time_limit_is_not_for_who_may_not_ask_for_it(
    open_directory: Callable[[], Path],
) -> None:
    directory = open_directory()
    certs, now = directory / "certs", datetime.now(UTC)
    init_authority(certs, [], now=now)
    files = Authority.load(certs).issue_client("alice", "tenant", now=now).files("alice-client")
    write_new(certs, files)
    worker: dict[str, object] = {"job_timeout": "0", "max_job_timeout": "1h"}
    settings = {"worker": worker, **ROLES}
    async with open_embedded(directory, settings) as service:
        for who, seconds in (("alice", 3600), ("admin", 0)):
            async with open_wire(service, who) as wire:
                result = await wire.call("job.run", job={"command": ["true"]})
                job = result["job"]
                assert isinstance(job, dict)
                assert job["spec"]["timeout_seconds"] == seconds
