"""A service that runs out of file descriptors refuses by name, and goes on."""

import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trio

from jobworker.cli.worker.embedded_service import EmbeddedService, program
from jobworker.pki.administration import init_authority
from jobworker.server.host.descriptor_budget import (
    MIN_OUTPUTS,
    OWN,
    PER_CONNECTION,
    PER_OUTPUT,
    PER_RUNNING,
    PER_WAITING,
)

from ..services import open_embedded, write_configuration
from .conftest import settled, until
from .wire import Refused, Wire, open_wire

NAMED = {"no_descriptors", "too_many_follows"}


def open_descriptors(pid: int) -> int:
    """How many a process has."""
    return len(os.listdir(f"/proc/{pid}/fd"))


@contextmanager
def no_more_descriptors(service: EmbeddedService, spare: int = 0) -> Iterator[None]:
    """Let the service open `spare` more descriptors and none beyond, while the block lasts."""
    pid = service.process.pid
    # What an ended job or connection had is closed after the answer, and would be room.
    taken = settled(lambda: frozenset(map(int, os.listdir(f"/proc/{pid}/fd"))), 0.5)
    # The limit is on the number of a new descriptor: what lies between counts as spare.
    free = [number for number in range(max(taken) + 2 + spare) if number not in taken]
    limit_descriptors(pid, free[spare])
    try:
        yield
    finally:
        limit_descriptors(pid, resource.getrlimit(resource.RLIMIT_NOFILE)[1])


def limit_descriptors(pid: int, limit: int) -> None:
    """Set a process's soft limit, as its own user: for another's one needs CAP_SYS_RESOURCE."""
    user = os.stat(f"/proc/{pid}").st_uid
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    words = ["prlimit", "--pid", str(pid), f"--nofile={limit}:{hard}"]
    subprocess.run(words, check=True, user=user, group=user, extra_groups=())


def name_of(refused: Refused) -> str:
    """The name of an error, for programs."""
    assert isinstance(refused.data, dict)
    return str(refused.data["name"])


async def refusals_of_follows(wire: Wire, jobs: list[int], times: int) -> set[str]:
    """Follow each of `jobs` so often on one connection: the names of what was refused."""
    found = set()
    for _ in range(times):
        for job in jobs:
            try:
                await wire.call("job.log", id=job, follow=True, delivery={"credit_bytes": 1})
            except Refused as refused:
                found.add(name_of(refused))
    return found


async def test_followers_of_one_ended_job_share_its_files(
    service: EmbeddedService, admin: Wire
) -> None:
    _, _, job = await admin.run("sh", "-c", "head -c 100000 /dev/zero")
    pid = service.process.pid
    before = open_descriptors(pid)
    subscriptions = []
    for _ in range(40):
        result = await admin.call("job.log", id=job["id"], delivery={"credit_bytes": 1})
        subscriptions.append(result["subscription"])
    assert open_descriptors(pid) <= before + 8, "three files, and what threads need"
    for number in subscriptions:
        await admin.notify("job.unfollow", subscription=number)
    await until(lambda: open_descriptors(pid) <= before + 1)
    out, _, _ = await admin.output((await admin.call("job.log", id=job["id"]))["subscription"])
    assert len(out) == 100_000


async def test_service_without_descriptors_refuses_by_name_and_goes_on(
    open_directory: Callable[[], Path],
) -> None:
    settings = {"worker": {"max_total_output": 64}}
    async with open_embedded(open_directory(), settings) as service, open_wire(service) as wire:
        ended = [int(str((await wire.run("echo", str(n)))[2]["id"])) for n in range(12)]
        long_lived = await wire.start("sleep", "600")
        live = await wire.start("sh", "-c", "while :; do echo line; sleep 0.02; done")
        named: set[str] = set()
        big = {f"NAME{n}": "x" * 1000 for n in range(60)}
        async with open_wire(service) as other:
            with no_more_descriptors(service):
                assert await refusals_of_follows(other, ended, 2) <= NAMED
                for spec in ({}, {"environment": big}):
                    with pytest.raises(Refused) as caught:
                        await wire.start("true", **spec)
                    named.add(name_of(caught.value))
                service.process.send_signal(signal.SIGHUP)
                await until(lambda: "reload" in service.log_text())
                await wire.call("job.list", limit=10)
                await wire.call("job.status", id=ended[0])
                # Retention looks at every output; it cannot now, and says so.
                with pytest.raises(Refused):
                    await wire.call("job.prune", keep_jobs=1)
            for spare in range(6):  # each number of descriptors fails at another place
                with no_more_descriptors(service, spare):
                    for spec in ({}, {"environment": big}):
                        try:
                            _, _, done = await wire.run("true", **spec)
                            assert done["state"] == "COMPLETED", done
                        except Refused as refused:
                            named.add(name_of(refused))
                    assert await refusals_of_follows(other, ended, 1) <= NAMED
        assert named <= NAMED
        assert service.process.returncode is None
        assert "the launcher has ended" not in service.log_text()
        assert "Traceback" not in service.log_text()
        for job in (live, long_lived):
            assert (await wire.call("job.status", id=job))["state"] == "RUNNING"
            await wire.call("job.stop", id=job)
        out, _, _ = await wire.run("echo", "again")
        assert out == "again\n"
        listed = await wire.call("job.list", states=["PENDING", "INITIALIZING", "RUNNING"])
        assert listed["jobs"] == []
        reread, _, _ = await wire.output((await wire.call("job.log", id=ended[3]))["subscription"])
        assert reread == b"3\n"


async def test_end_without_descriptors_is_recorded_and_every_byte_kept(
    open_directory: Callable[[], Path],
) -> None:
    async with open_embedded(open_directory()) as service, open_wire(service) as wire:
        jobs = [
            await wire.start("sh", "-c", "echo begin; sleep 1; head -c 100000 /dev/zero; exit 3")
            for _ in range(4)
        ]
        with no_more_descriptors(service), trio.fail_after(30):
            for job in jobs:
                ended = await wire.call("job.wait", id=job)
                assert (ended["state"], ended["exit_code"]) == ("FAILED", 3)
                assert ended["stdout_bytes"] == 100_006
        for job in jobs:
            out, _, _ = await wire.output((await wire.call("job.log", id=job))["subscription"])
            assert len(out) == 100_006


def test_start_with_too_few_descriptors_is_refused_before_anything_is_touched(
    open_directory: Callable[[], Path],
) -> None:
    directory = open_directory()
    init_authority(directory / "certs", [], now=datetime.now(UTC))
    config = write_configuration(directory, {"worker": {"max_waiting_jobs": 1000}})
    done = subprocess.run(
        ["prlimit", "--nofile=2000:2000", *program("worker"), "serve", "--config", str(config)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 80, done.stderr
    for words in ("descriptors", "2000", "LimitNOFILE", "worker.max_waiting_jobs"):
        assert words in done.stderr
    assert not (directory / "state").exists()


async def test_jobs_that_wait_go_on_waiting_where_there_is_no_descriptor_for_them(
    open_directory: Callable[[], Path],
) -> None:
    settings = {"worker": {"max_concurrent_jobs": 1}}
    async with open_embedded(open_directory(), settings) as service, open_wire(service) as wire:
        running = await wire.start("sleep", "600")
        waiting = [await wire.start("echo", str(n)) for n in range(3)]
        limit_descriptors(service.process.pid, 3)  # what the first job gives back is of no use
        await wire.call("job.stop", id=running, signal="KILL")
        await until(lambda: "is tried again" in service.log_text())
        limit_descriptors(service.process.pid, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        for job in waiting:
            assert (await wire.call("job.wait", id=job))["state"] == "COMPLETED"


async def test_who_follows_jobs_to_their_ends_and_takes_nothing_leaves_descriptors_to_others(
    open_directory: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, dict[str, object]] = {
        "worker": {"max_concurrent_jobs": 4, "max_waiting_jobs": 4},
        "limits": {"max_connections": 20, "max_handshakes": 10},
    }
    outputs = MIN_OUTPUTS + 2
    limit = OWN + 4 * PER_RUNNING + 4 * PER_WAITING + 30 * PER_CONNECTION + outputs * PER_OUTPUT
    bounded = ["prlimit", f"--nofile={limit}:{limit}", *program("worker")]
    monkeypatch.setattr("jobworker.cli.worker.embedded_service.program", lambda _: bounded)
    async with (
        open_embedded(open_directory(), settings) as service,
        open_wire(service) as wire,
        open_wire(service) as other,
    ):
        before = open_descriptors(service.process.pid)
        begun = []
        for _ in range(3 * outputs):
            job = {"command": ["echo", "x"]}
            begun.append(await wire.call("job.run", job=job, follow={"credit_bytes": 0}))
            ended = begun[-1]["job"]
            assert isinstance(ended, dict)
            await wire.call("job.wait", id=ended["id"])
        # Beside them what a job has that ends just now, and threads need.
        assert open_descriptors(service.process.pid) < before + PER_OUTPUT * outputs + 30
        assert (await other.run("echo", "y"))[0] == "y\n"
        subscription, first = begun[0]["subscription"], begun[0]["job"]
        assert isinstance(first, dict)
        await wire.notify("job.credit", subscription=subscription, bytes=100)
        end = await wire.notes(subscription).receive()
        assert isinstance(end["params"], dict)
        assert end["params"]["error"]["name"] == "follower_stalled"
        for each in begun:
            await wire.notify("job.unfollow", subscription=each["subscription"])
        again = await wire.call("job.log", id=first["id"], offset=end["params"]["offset"])
        assert (await wire.output(again["subscription"]))[0] == b"x\n"
