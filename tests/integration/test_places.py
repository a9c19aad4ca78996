"""A job's place: taken while anything of it is left but its end, and free as soon as nothing is."""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from jobworker.sandbox import channel
from jobworker.sandbox.service.launch import OpenedLauncher
from jobworker.sandbox.start.private_network import PROGRAM

from ..services import open_embedded
from .conftest import child_of, disks_of_size, left_behind, size_of_this_run, until
from .outside import open_launcher
from .test_outside_launcher import ORDER, ask, connect, reconnect_when_free, spawn
from .test_takeover import first_of
from .wire import Refused, open_wire

DISK_BYTES = size_of_this_run(48)
"""Of a size that nobody else's disks have."""
PLACES = {"worker": {"max_concurrent_jobs": 2}, "sandbox": {"spares": 2, "disk_limit": 32}}


@pytest.fixture
def site(open_directory: Callable[[], Path]) -> Iterator[Path]:
    """A launcher with two places; at the end nothing of it may be left."""
    directory = open_directory()
    with open_launcher(directory, PLACES):
        yield directory
    assert left_behind(directory) == []


@pytest.fixture
def link(site: Path) -> Iterator[OpenedLauncher]:
    opened = connect(site)
    yield opened
    opened.close()


def ends(link: OpenedLauncher, job: int) -> None:
    """Wait until the launcher has told of a job's end."""
    while True:
        received = channel.receive(link.sock)
        assert received is not None
        channel.close_all(received[1])
        if (received[0].get("event"), received[0].get("job")) == ("exit", job):
            return


def until_no_disk() -> None:
    deadline = time.monotonic() + 20
    while disks_of_size(DISK_BYTES):
        assert time.monotonic() < deadline
        time.sleep(0.01)


async def test_waiting_jobs_with_networks_of_their_own_never_find_a_place_taken(
    open_directory: Callable[[], Path],
) -> None:
    """A gateway ends after its job: the place is not free before."""
    if not any(os.access(f"{way}/{PROGRAM}", os.X_OK) for way in ("/usr/bin", "/usr/sbin")):
        pytest.skip("needs slirp4netns")
    async with open_embedded(open_directory(), PLACES) as service, open_wire(service) as wire:
        jobs = [await wire.start("true", network="private") for _ in range(30)]
        ended = [await wire.call("job.wait", id=job) for job in jobs]
        assert [(job["state"], job["detail"]) for job in ended] == [("COMPLETED", "")] * 30


async def test_starts_that_fail_leave_no_place_taken(open_directory: Callable[[], Path]) -> None:
    async with open_embedded(open_directory(), PLACES) as service, open_wire(service) as wire:
        mixed = [("/nosuch", "private"), ("true", "none"), ("/nosuch", "host")] * 10
        for program, network in mixed:
            with suppress(Refused):
                await wire.call("job.run", job={"command": [program], "network": network})
        listed = (await wire.call("job.list"))["jobs"]
        assert isinstance(listed, list)
        ended = [await wire.call("job.wait", id=job["id"]) for job in listed]
        details = [str(job["detail"]) for job in ended if job["state"] != "COMPLETED"]
        assert len(ended) == 30
        assert all("no such program" in text for text in details), details


def test_disk_of_an_ended_job_goes_before_anybody_removes_the_job(
    site: Path, link: OpenedLauncher
) -> None:
    pipes = spawn(link.sock, 1, "sh", "-c", "echo kept; exit 3", disk_bytes=DISK_BYTES)
    ends(link, 1)
    until_no_disk()
    reply, _ = ask(link.sock, "usage", 1)
    usage = reply["ok"]
    assert isinstance(usage, dict)
    assert usage["cpu_ns"] > 0, "its use is known though its scope is gone"
    assert os.read(pipes[0], 100) == b"kept\n"
    channel.close_all(pipes)
    reply, _ = ask(link.sock, "signal", 1, signal=signal.SIGTERM)
    assert reply["error"] == {"step": "request", "errno": 3, "detail": "[Errno 3] No such process"}
    assert "ok" in ask(link.sock, "remove", 1)[0]


def test_disk_goes_while_no_service_is_there(site: Path, link: OpenedLauncher) -> None:
    mark = f"place-{os.getpid()}-"
    script = f"trap 'exit 7' USR1; echo; while :; do sleep 0.05; done; : {mark}"
    pipes = spawn(link.sock, 1, "sh", "-c", script, disk_bytes=DISK_BYTES)
    assert os.read(pipes[0], 1) == b"\n"
    assert disks_of_size(DISK_BYTES) == 1
    link.close()
    os.kill(first_of(mark), signal.SIGUSR1)
    until_no_disk()
    again = reconnect_when_free(site)
    until_no_disk()
    assert [(job.job, job.exit and job.exit.code) for job in again.jobs] == [(1, 7)]
    again.close()


def test_a_start_that_finds_the_last_places_about_to_become_free_waits_for_one(
    site: Path, link: OpenedLauncher
) -> None:
    """A service that has come anew knows nothing of what its predecessor's launcher still ends."""
    for number in range(1, 20):
        for job in (2 * number, 2 * number + 1):
            channel.close_all(spawn(link.sock, job, "sleep", "60"))
        for job in (2 * number, 2 * number + 1):
            ask_quickly(link.sock, job)


def ask_quickly(sock: socket.socket, job: int) -> None:
    """Remove a job and start another one in its place, without waiting for the first answer."""
    channel.send(sock, {"id": 1, "op": "remove", "job": job})
    order = {**ORDER, "disk_bytes": 48 << 20, "arguments": ["true"]}
    channel.send(sock, {"id": 2, "op": "spawn", "job": 1000 + job, **order})
    answers: dict[object, channel.Message] = {}
    while not {1, 2} <= answers.keys():
        received = channel.receive(sock)
        assert received is not None
        message, pipes = received
        channel.close_all(pipes)
        answers[message.get("id")] = message
    assert "ok" in answers[1], answers
    assert "ok" in answers[2], answers
    assert "ok" in ask(sock, "remove", 1000 + job)[0]


def test_jobs_that_nobody_removes_are_bounded(site: Path, link: OpenedLauncher) -> None:
    """Their ends and pipes are kept, so there must not be any number of them."""
    for job in range(1, 5):
        channel.close_all(spawn(link.sock, job, "true"))
        ends(link, job)
    reply, _ = ask(link.sock, "spawn", 5, arguments=["true"], **ORDER)
    problem = reply["error"]
    assert isinstance(problem, dict)
    assert "jobs that were not removed" in str(problem["detail"])
    assert "ok" in ask(link.sock, "remove", 1)[0]
    channel.close_all(spawn(link.sock, 5, "true"))


async def test_launcher_that_ends_with_ended_jobs_leaves_nothing(
    open_directory: Callable[[], Path],
) -> None:
    directory = open_directory()
    with open_launcher(directory, PLACES) as process:
        link = connect(directory)
        channel.close_all(spawn(link.sock, 1, "true"))
        ends(link, 1)
        launcher = child_of(process.pid)
        link.close()
    await until(lambda: not Path(f"/proc/{launcher}").exists())
    assert left_behind(directory) == []
