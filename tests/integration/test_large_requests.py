"""Jobs whose requests have a megabyte start with all of it, and cost little while they live."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ..services import open_embedded
from .conftest import until
from .outside import open_launcher
from .test_takeover import Settings, serving, start
from .test_vanishing import memory_bytes
from .wire import Refused, Wire, open_wire

ONE: Settings = {"worker": {"max_concurrent_jobs": 1, "max_waiting_jobs": 200}}
VARIABLES = {f"VARIABLE_{number}": f"value {number}" for number in range(30_000)}
SCRIPT = 'env | grep -c ^VARIABLE_; test "$VARIABLE_17" && echo $#'
COUNT = ["sh", "-c", SCRIPT, "sh", *["x"] * 900]
MIB = 1 << 20


@pytest.mark.alone
@pytest.mark.parametrize("kind", ["environment", "secret_environment"])
async def test_waiting_job_costs_little_and_gets_all_of_its_request(
    open_directory: Callable[[], Path], kind: str
) -> None:
    async with open_embedded(open_directory(), ONE) as service, open_wire(service) as wire:
        running = await wire.start("sleep", "600", **{kind: VARIABLES})
        last = await wire.start(*COUNT, **{kind: VARIABLES})
        before = memory_bytes(service)
        count, most = (12, MIB // 4) if kind == "environment" else (6, 3 * MIB)
        jobs = [await wire.start("true", **{kind: VARIABLES}) for _ in range(count)]
        # What is free goes back to the system within seconds.
        await until(lambda: memory_bytes(service) - before < count * most)
        for job in (running, last):
            spec = (await wire.call("job.status", id=job))["spec"]
            assert isinstance(spec, dict)
            assert len(spec[kind]) == len(VARIABLES)
        await wire.call("job.stop", id=running, grace_seconds=0)
        record = await wire.call("job.wait", id=last)
        assert record["state"] == "COMPLETED", record
        out, _, _ = await wire.output((await wire.call("job.log", id=last))["subscription"])
        assert out == b"30000\n900\n"
        for job in jobs:
            assert (await wire.call("job.wait", id=job))["state"] == "COMPLETED"


async def until_refused(wire: Wire) -> Refused:
    for _ in range(20):
        try:
            await wire.start("true", secret_environment=VARIABLES)
        except Refused as refused:
            return refused
    pytest.fail("none was refused")


async def test_secrets_that_wait_have_a_bound(open_directory: Callable[[], Path]) -> None:
    async with open_embedded(open_directory(), ONE) as service, open_wire(service) as wire:
        running = await wire.start("sleep", "600")
        refused = await until_refused(wire)
        assert "the secret variables of your waiting jobs" in refused.message
        assert isinstance(refused.data, dict)
        assert refused.data["name"] == "busy"
        small = await wire.start("true", secret_environment={"TOKEN": "x" * 1000})
        await wire.call("job.stop", id=running, grace_seconds=0)
        assert (await wire.call("job.wait", id=small))["state"] == "COMPLETED"
        later = await wire.start("true", secret_environment=VARIABLES)
        assert (await wire.call("job.wait", id=later))["state"] == "COMPLETED"


async def test_request_is_whole_after_a_restart(open_directory: Callable[[], Path]) -> None:
    directory = open_directory()
    script = "until test -e /tmp/go; do sleep 0.1; done"
    with open_launcher(directory):
        async with serving(directory, ONE) as service, open_wire(service) as wire:
            running = await start(wire, script, environment=VARIABLES)
            waiting = await wire.start(*COUNT, environment=VARIABLES, labels={"a": "x" * 255})
            secret = await wire.start("true", secret_environment=VARIABLES)
        async with serving(directory, ONE) as service, open_wire(service) as wire:
            spec = (await wire.call("job.status", id=running))["spec"]
            assert isinstance(spec, dict)
            assert spec["environment"] == VARIABLES
            page = await wire.call("job.list", labels={"a": "x" * 255})
            jobs = page["jobs"]
            assert isinstance(jobs, list)
            assert [job["id"] for job in jobs] == [waiting]
            assert (await wire.call("job.wait", id=secret))["reason"] == "lost"
            await wire.call("job.stop", id=running, grace_seconds=0)
            assert (await wire.call("job.wait", id=waiting))["state"] == "COMPLETED"
            out, _, _ = await wire.output((await wire.call("job.log", id=waiting))["subscription"])
            assert out == b"30000\n900\n"
