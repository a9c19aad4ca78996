"""The launcher waits for none of the kernel's locks on groups, and loses no job with its maker.

Whoever holds these locks has the fork server wait, so one that is stopped stands for them here.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobworker.sandbox import channel
from jobworker.sandbox.launcher import host_names
from jobworker.sandbox.protocol.policy import LauncherPolicy
from jobworker.sandbox.service.launch import start_launcher

from .conftest import child_of, fork_server_of, named_child_of, spares_of
from .test_launcher import Service, make_policy, service

__all__ = ["make_policy", "service"]


def forks_of(service: Service) -> int:
    """The process that makes its processes."""
    return fork_server_of(child_of(service.process.pid))


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Have a process do nothing while the block lasts."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):  # the block may have ended it
            os.kill(pid, signal.SIGCONT)


def send(service: Service, number: int, operation: str, **fields: object) -> None:
    """Ask for something and wait for nothing."""
    channel.send(service.sock, {"id": number, "op": operation, **fields})


def wait_for_a_spare(service: Service) -> None:
    """Until one stands ready."""
    launcher = child_of(service.process.pid)
    deadline = time.monotonic() + 20
    while not spares_of(launcher):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_launcher_goes_on_while_no_host_name_can_be_set(service: Service) -> None:
    """uname(2) of any job may hold the kernel's lock that this waits for; only starts wait too."""
    assert "ok" in service.spawn(1, "sleep", "600")[0]
    launcher = child_of(service.process.pid)
    with stopped(named_child_of(launcher, host_names.NAME)):
        wait_for_a_spare(service)
        send(service, 1002, "spawn", job=2, **{**service.fields("hostname"), "hostname": "late"})
        send(service, 1003, "spawn", job=3, **service.fields("sleep", "600"))
        assert "ok" in service.ask("usage", 1)[0]
        assert service.ask("give_up", 3)[0]["ok"] == {"given_up": True}
        assert "error" in service.reply_to(1003)[0], "it is cleared away before its name is set"
        assert "ok" in service.ask("kill", 1)[0]
        assert service.exit_of(1)["signal"] == signal.SIGKILL
        assert service.ask("remove", 1)[0]["ok"] == {}
    reply, (stdout, stderr) = service.reply_to(1002)
    assert "ok" in reply
    assert service.exit_of(2)["code"] == 0
    assert os.read(stdout, 100) == b"late\n"
    channel.close_all([stdout, stderr])
    assert "ok" in service.spawn(4, "true")[0]


def test_start_whose_name_follows_the_last_one_finds_a_spare_that_has_it(
    make_policy: Callable[..., LauncherPolicy],
) -> None:
    """It waits for nobody: the process that sets names stands still."""
    policy = make_policy()._replace(spares=2)
    service = Service(start_launcher(policy), policy)
    launcher = child_of(service.process.pid)
    deadline = time.monotonic() + 20
    while len(spares_of(launcher)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    start_named(service, 1, "job-9")
    wait_for_a_spare_called("job-10", launcher)
    start_named(service, 2, "job-10")
    wait_for_a_spare_called("job-11", launcher)  # beside an older one, which has no such name
    named = named_child_of(launcher, host_names.NAME)
    while Path(f"/proc/{named}/stat").read_text().rsplit(")", 1)[1].split()[0] != "S":
        time.sleep(0.001)  # it has answered then
    service.ask("list", 0, after=0)  # a turn, which takes the answer
    with stopped(named):
        start_named(service, 3, "job-11")
    service.sock.close()
    assert service.leaves() == 0


def start_named(service: Service, job: int, name: str) -> None:
    """Run hostname(1) as a job; it prints this name."""
    reply, (stdout, stderr) = service.spawn(job, "hostname", hostname=name)
    assert "ok" in reply
    assert service.exit_of(job)["code"] == 0
    assert os.read(stdout, 100).decode() == f"{name}\n"
    channel.close_all([stdout, stderr])


def wait_for_a_spare_called(name: str, launcher: int) -> None:
    """Until one has this host name."""
    deadline = time.monotonic() + 20
    while name not in map(host_name_of, spares_of(launcher)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def host_name_of(pid: int) -> str:
    """The host name that a process sees."""
    command = ["nsenter", "-t", str(pid), "-u", "hostname"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def test_host_names_are_set_by_the_next_process_if_one_ends(service: Service) -> None:
    named = named_child_of(child_of(service.process.pid), host_names.NAME)
    os.kill(named, signal.SIGSTOP)
    wait_for_a_spare(service)
    send(service, 1001, "spawn", job=1, **{**service.fields("hostname"), "hostname": "kept"})
    assert "ok" in service.ask("list", 0, after=0)[0]
    os.kill(named, signal.SIGKILL)
    reply, (stdout, stderr) = service.reply_to(1001)
    assert "ok" in reply
    assert service.exit_of(1)["code"] == 0
    assert os.read(stdout, 100) == b"kept\n"
    channel.close_all([stdout, stderr])


def test_launcher_goes_on_while_nothing_can_be_made_or_removed(service: Service) -> None:
    """Starts with a spare, ends, stops and questions wait for nobody; the rest is done later."""
    for job in (1, 2):
        assert "ok" in service.spawn(job, "sh", "-c", "read x < /dev/zero; sleep 600")[0]
    wait_for_a_spare(service)
    with stopped(forks_of(service)):
        assert "ok" in service.spawn(3, "true")[0], "the spare"
        assert service.exit_of(3)["code"] == 0
        assert "ok" in service.ask("kill", 1)[0]
        assert service.exit_of(1)["signal"] == signal.SIGKILL
        send(service, 1001, "remove", job=1)
        send(service, 1004, "spawn", job=4, **service.fields("true"))
        assert "ok" in service.ask("usage", 2)[0]
        assert "ok" in service.ask("list", 0, after=0)[0]
        assert "error" in service.ask("usage", 4)[0], "it has no process yet"
        assert service.ask("signal", 4, signal=15)[0]["ok"] == {"delivered": False}
    assert "ok" in service.reply_to(1004)[0]
    assert service.exit_of(4)["code"] == 0
    turns = service.ask("turns", 0)[0]["ok"]
    assert isinstance(turns, dict)
    assert turns["incidents"] == 0


def test_start_is_given_up_before_it_has_a_process(service: Service) -> None:
    wait_for_a_spare(service)
    with stopped(forks_of(service)):
        assert "ok" in service.spawn(1, "sleep", "600")[0]
        for job in (2, 3, 4):
            send(service, 1000 + job, "spawn", job=job, **service.fields("true"))
        assert service.ask("give_up", 2)[0]["ok"] == {"given_up": True}
        assert "ok" in service.ask("kill", 3)[0]
        send(service, 1014, "remove", job=4)
        assert "ok" in service.ask("ping", 0)[0]
    refused = set[object]()
    while len(refused) < 3:
        message, _ = service.receive()
        if message.get("id") in (1002, 1003, 1004):
            assert "error" in message, "its program has not run"
            refused.add(message["id"])
    for job in (5, 6, 7):
        assert "ok" in service.spawn(job, "true")[0], "no place is lost"
        assert service.exit_of(job)["code"] == 0
        assert "ok" in service.ask("remove", job)[0]


def test_launcher_that_ends_while_its_fork_server_stands_still_leaves_nothing(
    make_policy: Callable[..., LauncherPolicy],
) -> None:
    policy = make_policy()
    service = Service(start_launcher(policy), policy)
    wait_for_a_spare(service)
    forks = forks_of(service)
    with stopped(forks):
        assert "ok" in service.spawn(1, "sleep", "600")[0]
        send(service, 1002, "spawn", job=2, **service.fields("sleep", "600"))
        assert "ok" in service.ask("list", 0, after=0)[0]
        service.process.kill()
        service.process.wait(20)
    service.sock.close()
    again = Service(start_launcher(policy), policy)
    assert "ok" in again.spawn(1, "true")[0]
    again.sock.close()
    assert again.leaves() == 0


def started(service: Service, *jobs: int) -> dict[int, list[int]]:
    """The pipes of jobs whose requests have the numbers 1000 and up, in any order."""
    pipes = dict[int, list[int]]()
    while len(pipes) < len(jobs):
        message, descriptors = service.receive()
        if "id" in message:
            assert "ok" in message, message
            pipes[int(str(message["id"])) - 1000] = descriptors
    return pipes


@pytest.mark.parametrize("number", range(6))
def test_fork_server_that_is_killed_costs_no_job_and_leaves_nothing(
    service: Service, number: int
) -> None:
    """At another moment each time: starts that it was asked for are made by the next one."""
    reply, pipes = service.spawn(1, "sh", "-c", "read x; echo $x; exit 3")
    assert "ok" in reply
    for round in range(8):
        forks = forks_of(service)
        first = 10 * (round + 1)
        for job in (first, first + 1):
            send(service, 1000 + job, "spawn", job=job, **service.fields("echo", "once"))
        time.sleep(0.002 * number + 0.0007 * round)
        with contextlib.suppress(ProcessLookupError):
            os.kill(forks, signal.SIGKILL)
        for job, more in started(service, first, first + 1).items():
            os.set_blocking(more[0], True)
            assert service.exit_of(job)["code"] == 0
            assert os.read(more[0], 100) == b"once\n", "and not twice"
            assert os.read(more[0], 100) == b""
            channel.close_all(more)
            assert "ok" in service.ask("remove", job)[0]
    assert "ok" in service.ask("usage", 1)[0], "it goes on"
    assert "ok" in service.ask("kill", 1)[0]
    service.exit_of(1)
    channel.close_all(pipes)


def test_private_network_and_init_survive_their_maker(service: Service) -> None:
    for job in range(1, 5):
        forks = forks_of(service)
        send(service, 1000 + job, "spawn", job=job, **{**service.fields("true"), "init": True})
        time.sleep(0.004 * job)
        with contextlib.suppress(ProcessLookupError):
            os.kill(forks, signal.SIGKILL)
        assert "ok" in service.reply_to(1000 + job)[0]
        assert service.exit_of(job)["code"] == 0
        assert "ok" in service.ask("remove", job)[0]
