"""`--network=private`: a way out, no way in, no host; and a gateway that leaves nothing behind."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from jobworker.cli.worker.embedded_service import EmbeddedService
from jobworker.sandbox.start.private_network import PROGRAM

from ..services import open_embedded
from .conftest import child_of, left_behind, until
from .test_cli import Cli, fails
from .wire import Refused, Wire, open_wire

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """What `two_hosts` found out."""
    if os.geteuid() != 0:
        pytest.skip("needs root: namespaces and control groups")
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.two_hosts"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_host_network_reaches_everything(seen: dict[str, Any], protocol: str) -> None:
    """The control: each server is there, and a job in the host's network is greeted by it."""
    answers = seen["host"][protocol]
    assert {place: said.split()[0] for place, said in answers.items()} == seen["places"]
    assert len(answers) == 13


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_private_network_reaches_the_outside_alone(seen: dict[str, Any], protocol: str) -> None:
    answers = seen["private"][protocol]
    reached = {place: said for place, said in answers.items() if said != "refused"}
    assert reached == {"10.77.0.2|7000": "peer 10.77.0.1"}, "as the host, by its address"
    assert len(answers) == 13 + 18, "every address of the host, gateway and resolver were tried"


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_no_network_reaches_nothing(seen: dict[str, Any], protocol: str) -> None:
    assert set(seen["none"][protocol].values()) == {"refused"}


def test_names_resolve_where_the_hosts_do_even_by_a_resolver_on_its_loopback(
    seen: dict[str, Any],
) -> None:
    resolved = {network: seen[network]["resolved"] for network in ("host", "none", "private")}
    assert resolved == {"host": "10.77.0.2", "none": "refused", "private": "10.77.0.2"}


def test_nothing_gets_in(seen: dict[str, Any]) -> None:
    assert "inside" in seen["host"]["entered"], "the control"
    assert set(seen["none"]["entered"]) == {"refused"}
    assert set(seen["private"]["entered"]) == {"refused"}


def test_no_way_of_a_socket_leads_to_the_host(seen: dict[str, Any]) -> None:
    """Also not to addresses that it got, or made its own by a route, while the job was running."""
    private, host = seen["private by all ways"], seen["host by all ways"]
    for tried in (private["tried"], host["tried"]):
        assert sum(line.endswith(" sent") for line in tried) > 900, "attempts that the kernel took"
    assert private["at the host"] == []
    there = set(host["at the host"])
    assert there >= {
        f"{way} {place}"
        for way in ("udp plain", "message msg-confirm")
        for place in ("127.0.0.1", "10.77.0.9", "203.0.113.5", "10.77.0.33", "fd77::1")
    }, "the control: the witness is there, and the host has its later addresses"
    assert "message pktinfo-0.0.0.0 239.77.0.1" in there


def test_ways_lead_to_the_outside(seen: dict[str, Any]) -> None:
    """The control: they do work in a private network, and not towards the host."""
    outside = set(seen["private by all ways"]["at the peer"])
    assert outside >= {
        "udp plain 10.77.0.2",
        "udp device 10.77.0.2",
        "udp ifindex ::ffff:10.77.0.2",
        "udp unicast-if 10.77.0.2",
        "ping plain 10.77.0.2",
        "message pktinfo-0.0.0.0 10.77.0.2",
        "message pktinfo6-::ffff:10.0.2.100 ::ffff:10.77.0.2",
        "parts 10.77.0.2",
        "segments 10.77.0.2",
    }
    assert any(name.startswith("tcp") for name in outside)


def gateways(of: int) -> list[int]:
    """The gateways below a process."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            parent = int(re.findall(r"^PPid:\s+(\d+)$", (process / "status").read_text(), re.M)[0])
        except (OSError, IndexError):
            continue
        if words[0] == PROGRAM.encode() and parent == of:
            found.append(int(process.name))
    return found


def launcher_of(service: EmbeddedService) -> int:
    """The process that the jobs are below."""
    return child_of(child_of(service.process.pid))


async def only_gateway(service: EmbeddedService) -> list[int]:
    """The one gateway, once those of earlier tests' jobs are gone."""
    launcher = launcher_of(service)
    await until(lambda: len(gateways(launcher)) == 1)
    return gateways(launcher)


def sleeps_elsewhere(process: Path, seconds: str) -> bool:
    """Whether it sleeps so long in another network than ours."""
    with suppress(OSError):  # others of the host come and go
        if (process / "cmdline").read_text() == f"sleep\0{seconds}\0":
            return (process / "ns" / "net").readlink() != Path("/proc/self/ns/net").readlink()
    return False


async def test_gateway_has_no_rights_no_descriptors_and_ends_with_its_job(
    admin: Wire, service: EmbeddedService
) -> None:
    seconds = f"60.{os.getpid()}"
    job = await admin.start("sleep", seconds, network="private")
    (gateway,) = await only_gateway(service)
    at = Path(f"/proc/{gateway}")
    status = dict(re.findall(r"^(\w+):\s+(.*)$", (at / "status").read_text(), re.M))
    (sleeper,) = [
        process for process in Path("/proc").glob("[0-9]*") if sleeps_elsewhere(process, seconds)
    ]
    uids = {int(uid) for uid in status["Uid"].split()}
    assert min(uids) > 1_879_048_192 + 60 * 65_536, "an id behind the ranges of all jobs"
    assert len(uids) == 1
    assert sleeper.stat().st_uid not in uids
    assert int(status["CapEff"], 16) in (0, 1 << 10), "at most low ports, and of no namespace"
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    for kind in ("pid", "mnt", "ipc", "uts", "user"):
        theirs = {os.readlink(path / "ns" / kind) for path in (at, sleeper, Path("/proc/self"))}
        assert len(theirs) == 3, f"{kind} is nobody else's"
    assert os.readlink(at / "ns" / "net") == os.readlink("/proc/self/ns/net"), "it speaks outside"
    assert (at / "cgroup").read_text() == (sleeper / "cgroup").read_text(), (
        "within the job's limits"
    )
    assert sorted(os.listdir(at / "root")) == ["etc", "run"]
    assert os.listdir(at / "root" / "run") == []
    names = [os.readlink(entry) for entry in (at / "fd").iterdir()]
    own = ("/null", "/net/tun", "/log", "net:[", "socket:[")
    assert all(name.startswith(own) for name in names), names
    assert sum(name.startswith("socket:[") for name in names) <= 5, names
    environment = (at / "environ").read_bytes()
    assert environment == b"PATH=/usr/bin:/bin\0"
    await admin.call("job.stop", id=job)
    await until(lambda: not at.exists())


async def test_gateway_is_out_of_the_jobs_sight_and_reach(admin: Wire) -> None:
    script = (
        "ps -e --no-headers | wc -l; cat /proc/self/net/tcp | wc -l;"
        "ip link set tap0 down 2>&1; ip rule del pref 101 2>&1; ip route flush table main 2>&1;"
        "ip rule | grep -c unreachable; ls /dev/net /sys/class/net 2>&1"
    )
    out, err, _ = await admin.run("sh", "-c", script, network="private")
    lines = out.splitlines()
    assert int(lines[0]) <= 3, "sh, ps and wc"
    assert out.count("Operation not permitted") >= 2, (out, err)
    assert "6" in lines, "the rules are all there"


async def test_job_that_is_killed_or_fails_takes_its_gateway_along(
    admin: Wire, service: EmbeddedService
) -> None:
    launcher = launcher_of(service)
    await admin.run("sh", "-c", "kill -9 $$; exit 3", network="private")
    with pytest.raises(Refused):
        await admin.run("/no/such/program", network="private")
    await admin.run("true", network="private")
    await until(lambda: gateways(launcher) == [])


async def test_gateway_that_dies_ends_the_network_and_not_the_job(
    admin: Wire, service: EmbeddedService
) -> None:
    job = await admin.start("sh", "-c", "read x < /tmp/fifo || sleep 60", network="private")
    (gateway,) = await only_gateway(service)
    os.kill(gateway, signal.SIGKILL)
    told = f"its private network ended: its {PROGRAM} ended by signal 9"
    await until(lambda: f"WARNING job {job}: {told}" in service.log_text())
    result = await admin.call("job.status", id=job)
    assert (result["state"], result["detail"]) == ("RUNNING", told)
    result = await admin.call("job.stop", id=job)
    assert result["detail"] == told


async def test_job_that_is_killed_with_its_network_is_told_as_killed(admin: Wire) -> None:
    job = await admin.start("sleep", "60", network="private")
    result = await admin.call("job.stop", id=job, signal="KILL")
    assert (result["state"], result["detail"]) == ("STOPPED", "")


async def test_limit_on_processes_is_the_jobs_own(admin: Wire) -> None:
    script = """
import os, signal
children = []
try:
    while True:
        child = os.fork()
        if child == 0:
            signal.pause()
        children.append(child)
except BlockingIOError:
    print(len(children))
for child in children:
    os.kill(child, signal.SIGKILL)
"""
    for network in ("host", "private"):
        out, err, _ = await admin.run(
            "python3", "-c", script, network=network, limits={"processes": 6}
        )
        assert out == "5\n", err
    out, _, _ = await admin.run("echo", "ran", network="private", limits={"processes": 1})
    assert out == "ran\n"


@pytest.mark.parametrize("victim", ["service", "launcher"])
async def test_nothing_outlives_service_and_launcher(
    open_directory: Callable[[], Path], victim: str
) -> None:
    directory = open_directory()
    settings = {"worker": {"max_concurrent_jobs": 4}}
    async with open_embedded(directory, settings) as service, open_wire(service) as wire:
        await wire.start("sleep", "600", network="private")
        launcher = launcher_of(service)
        (gateway,) = gateways(launcher)
        os.kill(launcher if victim == "launcher" else service.process.pid, signal.SIGKILL)
        await until(lambda: not Path(f"/proc/{gateway}").exists())
    async with open_embedded(directory, settings):
        pass
    assert left_behind(directory) == []


async def test_host_without_the_program_refuses_by_its_name(
    open_directory: Callable[[], Path],
) -> None:
    directory = open_directory()
    (directory / "programs").mkdir()
    settings = {"sandbox": {"programs": (str(directory / "programs"),)}}
    async with open_embedded(directory, settings) as service, open_wire(service) as wire:
        with pytest.raises(Refused, match="this host lacks slirp4netns") as refused:
            await wire.start("true", network="private")
        assert refused.value.data["remedy"].startswith("install the package slirp4netns")  # type: ignore[index]
        with pytest.raises(Refused, match="no such program"):
            await wire.start("true", network="none")


def test_command_line_tells_the_network(service: EmbeddedService) -> None:
    cli = Cli(service)
    done = cli("run", "--network", "private", "echo", "hello")
    assert "Network: private\n" in done.stdout, done.stderr
    number = re.findall(r"^ID: (\d+)$", done.stdout, re.M)[0]
    assert "Network: private\n" in cli("status", number).stdout
    assert json.loads(cli("status", number, "--json").stdout)["spec"]["network"] == "private"
    fails(cli("run", "--network=private", "/no/such"), 127, "no such program")
