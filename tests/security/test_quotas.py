"""A tenant cannot have more than its quota, however its requests come; another's is untouched."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio

from jobworker.cli.worker.embedded_service import EmbeddedService
from jobworker.errors import Busy, QuotaExceeded

from ..integration.wire import Refused, Wire, open_wire
from ..services import open_embedded
from .conftest import ROLES, make_people

SMALL = {"cpu_percent": 10, "memory_bytes": 8 << 20, "output_bytes": 100_000}
SLEEP = {"command": ["sleep", "600"]}


@pytest.fixture
async def quinn(tenants: EmbeddedService) -> AsyncIterator[Wire]:
    """A tenant of 3 jobs, one core, 64 MB and 2 MB of output; all is stopped and removed."""
    async with open_wire(tenants, "quinn") as wire:
        yield wire
        jobs = (await wire.call("job.list"))["jobs"]
        assert isinstance(jobs, list)
        for job in jobs:
            await wire.call("job.stop", id=job["id"], signal="KILL")
            await wire.call("job.remove", id=job["id"], force=True)


async def refused(wire: Wire, **limits: int) -> dict[str, object]:
    with pytest.raises(Refused) as caught:
        await wire.call("job.run", job={**SLEEP, "limits": {**SMALL, **limits}})
    assert caught.value.code == QuotaExceeded.code
    assert isinstance(caught.value.data, dict)
    assert caught.value.data["name"] == "quota_exceeded"
    return caught.value.data


async def test_jobs_at_once(tenants: EmbeddedService, quinn: Wire) -> None:
    for _ in range(3):
        await quinn.call("job.run", job={**SLEEP, "limits": SMALL})
    told = await refused(quinn)
    assert (told["quota"], told["limit"], told["used"]) == ("jobs", 3, 3)
    async with open_wire(tenants, "quentin") as other:  # another name of the same role
        job = await other.start("true", limits=SMALL)
        assert (await other.call("job.wait", id=job))["state"] == "COMPLETED"
    async with open_wire(tenants, "quinn") as again:  # a second connection is the same tenant
        await refused(again)


async def test_many_requests_at_once_get_no_more_than_one_by_one(quinn: Wire) -> None:
    outcomes: list[int] = []

    async def ask() -> None:
        try:
            await quinn.call("job.run", job={**SLEEP, "limits": SMALL})
            outcomes.append(0)
        except Refused as refusal:
            outcomes.append(int(str(refusal.code)))

    async with trio.open_nursery() as nursery:
        for _ in range(12):
            nursery.start_soon(ask)
    assert sorted(outcomes) == [0] * 3 + [QuotaExceeded.code] * 9


@pytest.mark.parametrize(
    ("measure", "key", "most"),
    [
        ("cpu", "cpu_percent", 100),
        ("memory", "memory_bytes", 64 << 20),
        ("output", "output_bytes", 2 << 20),
    ],
)
async def test_sum_of_limits(quinn: Wire, measure: str, key: str, most: int) -> None:
    assert (await refused(quinn, **{key: 0}))["asked"] is None
    assert (await refused(quinn, **{key: most + 1}))["quota"] == measure
    half = {**SMALL, key: most // 2}
    job = (await quinn.call("job.run", job={**SLEEP, "limits": half}))["job"]
    assert isinstance(job, dict)
    told = await refused(quinn, **{key: most // 2 + 1})
    assert (told["quota"], told["limit"], told["used"]) == (measure, most, most // 2)
    await quinn.call("job.run", job={**SLEEP, "limits": half})
    await quinn.call("job.stop", id=job["id"], signal="KILL")
    rest = {**half, key: most // 4}  # what a job leaves on disk counts
    await quinn.call("job.run", job={**SLEEP, "limits": rest})  # there is room again


async def test_output_of_ended_jobs_counts_until_it_is_removed(quinn: Wire) -> None:
    megabyte = ["sh", "-c", "head -c 1048576 /dev/zero"]
    limits = {**SMALL, "output_bytes": (1 << 20) + 4096}
    job = await quinn.start(*megabyte, limits=limits)
    ended = await quinn.call("job.wait", id=job)
    assert ended["stdout_bytes"] == 1 << 20
    told = await refused(quinn, output_bytes=(1 << 20) + 4096)
    assert told["quota"] == "output"
    assert int(str(told["used"])) >= 1 << 20
    await quinn.call("job.remove", id=job)
    await quinn.start("true", limits=limits)


async def test_tenant_that_fills_the_waiting_room_neither_shuts_out_nor_delays_another(
    open_directory: Callable[[], Path],
) -> None:
    few: dict[str, object] = {"max_concurrent_jobs": 2, "max_waiting_jobs": 20}
    extra = {"worker": few, **ROLES}
    async with (
        open_embedded(make_people(open_directory()), extra) as service,
        open_wire(service, "alice") as alice,
        open_wire(service, "bob") as bob,
    ):
        sleepers = [await alice.start("sleep", "600") for _ in range(2 + 18)]
        with pytest.raises(Refused) as full:  # the last tenth is for others
            await alice.start("sleep", "600")
        assert full.value.code == Busy.code
        quick = await bob.start("true")
        assert (await bob.call("job.status", id=quick))["state"] == "PENDING"
        await alice.call("job.stop", id=sleepers[0], signal="KILL")
        with trio.fail_after(20):  # a sleeper in its place would run for ten minutes
            ended = await bob.call("job.wait", id=quick)
        assert ended["state"] == "COMPLETED"
