"""An ordinary user runs a service: jobs are isolated, and what cannot be enforced is refused."""

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest

from jobworker.cli.worker.embedded_service import program, write_configuration
from jobworker.pki.administration import init_authority

from .ordinary_user import (
    FIRST_SUBUID,
    SUBUIDS,
    UID,
    can_have_subuids,
    command,
    delegated_groups,
    hierarchies,
)


class Served:
    """`worker demo --serve` of the user, and worker-cli at it."""

    def __init__(self, site: Path, *, subuids: bool = False, groups: Sequence[str] = ()) -> None:
        self.subuids = subuids
        arguments, environment = command(site, ["demo", "--serve"], subuids=subuids, groups=groups)
        self.process = subprocess.Popen(
            arguments, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self.process.stdout is not None
        self.settings: dict[str, str] = {}
        for line in self.process.stdout:
            if not line.startswith("export "):
                break
            name, _, value = line.removeprefix("export ").strip().partition("=")
            self.settings[name] = value
        if len(self.settings) != 4:
            self.end()
        assert len(self.settings) == 4

    def cli(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*program("worker-cli"), *arguments],
            env={**os.environ, **self.settings},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def end(self) -> None:
        with self.process:  # which closes its pipe too
            self.process.send_signal(signal.SIGINT)
            self.process.wait(timeout=60)


def processes_of(uids: range) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if process.stat().st_uid in uids:
                found.append(f"{process.name} {(process / 'cmdline').read_bytes()!r}")
        except OSError:
            continue
    return found


@pytest.fixture(scope="module", params=["one id", "a range of ids"])
def served(request: pytest.FixtureRequest, open_directory: Callable[[], Path]) -> Iterator[Served]:
    subuids = request.param == "a range of ids"
    if subuids and not can_have_subuids():
        pytest.skip("needs newuidmap (Debian package uidmap) and /etc/subuid")
    made = Served(open_directory(), subuids=subuids)
    yield made
    made.end()
    assert processes_of(range(UID, UID + 1)) == []
    assert processes_of(range(FIRST_SUBUID, FIRST_SUBUID + SUBUIDS)) == []


def test_job_is_root_inside_and_nobody_outside(served: Served) -> None:
    done = served.cli("run", "-f", "sh", "-c", "id -u; ps -e | wc -l; touch /tmp/x /usr/x")
    assert done.stdout.split()[0] == "0"
    assert int(done.stdout.split()[1]) <= 5
    assert "/usr/x" in done.stderr
    assert "/tmp/x" not in done.stderr
    commands = [f"sleep {number}.{os.getpid()}" for number in (612, 613)]  # no other run says them
    job, other = [served.cli("run", "-q", *each.split()).stdout.strip() for each in commands]
    outside = {owner_of(each) for each in commands}
    if served.subuids:
        assert len(outside) == 2
        assert all(FIRST_SUBUID <= uid < FIRST_SUBUID + SUBUIDS for uid in outside)
    else:
        assert outside == {UID}
    attack = "kill -9 -1; ls /proc /var/tmp /root; cat /etc/shadow"
    secret = served.cli("run", "-f", "sh", "-c", attack)
    assert secret.returncode != 0
    assert "jobworker" not in secret.stdout
    assert {owner_of(each) for each in commands} == outside
    assert served.cli("stop", "--grace=0", job, other).returncode == 0


def process_of(command_line: str) -> int:
    wanted = command_line.replace(" ", "\0").encode() + b"\0"
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cmdline").read_bytes() == wanted:
                return int(process.name)
        except OSError:
            continue
    raise AssertionError(f"{command_line} does not run")


def owner_of(command_line: str) -> int:
    status = Path(f"/proc/{process_of(command_line)}/status").read_text()
    return int(status.split("Uid:")[1].split()[0])


def test_limit_that_cannot_be_enforced_is_refused_by_name(served: Served) -> None:
    for option, controller in {"--max-memory=64": "memory", "--max-pids=5": "pids"}.items():
        done = served.cli("run", option, "true")
        assert done.returncode == 71
        assert f"cannot limit {controller}: the controller is not in use" in done.stderr


def test_user_beyond_the_range_is_refused_by_name(served: Served) -> None:
    done = served.cli("run", "-f", "--user=65000", "id")
    assert done.returncode == 71
    assert "set-user" in done.stderr


def test_with_delegated_groups_limits_hold(open_directory: Callable[[], Path]) -> None:
    with delegated_groups(f"jobworker-user-{os.getpid()}") as groups:
        served = Served(open_directory(), groups=groups)
        try:
            greed = "x = b'x' * 200_000_000"
            done = served.cli("run", "-f", "--max-memory=64", "python3", "-c", greed)
            assert done.returncode == 137
            assert "oom" in served.cli("list").stdout
            forks = "for i in 1 2 3 4 5 6 7 8 9; do sleep 60 & done"
            done = served.cli("run", "-f", "--max-pids=5", "sh", "-c", forks)
            assert "fork" in done.stderr
            seconds = f"614.{os.getpid()}"
            job = served.cli("run", "-q", "--max-cpu=50", "sleep", seconds).stdout.strip()
            assert limit_of(f"sleep {seconds}") in ("50000", "50000 100000")
            status = served.cli("status", job).stdout
            assert "50" in status
        finally:
            served.end()
    # A group that holds a process or another group could not have been removed.


def limit_of(command_line: str) -> str:
    """The CPU quota of the group that a job is in."""
    places = Path(f"/proc/{process_of(command_line)}/cgroup").read_text().splitlines()
    for line in places:
        _, controllers, path = line.split(":", 2)
        if controllers == "" and Path(f"/sys/fs/cgroup{path}/cpu.max").exists():
            return Path(f"/sys/fs/cgroup{path}/cpu.max").read_text().strip()
        if "cpu" in controllers.split(","):
            top = next(top for top in hierarchies() if "cpu" in Path(top).name.split(","))
            return Path(f"{top}{path}/cpu.cfs_quota_us").read_text().strip()
    raise AssertionError(places)


def test_check_tells_what_the_user_would_not_get(open_directory: Callable[[], Path]) -> None:
    arguments, environment = command(open_directory(), ["check", "--json"])
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    told = json.loads(done.stdout)
    assert told["mode"].startswith("ordinary user")
    lacking = {row["name"] for row in told["findings"] if row["needed"] and not row["supported"]}
    assert {"cpu limit", "memory limit", "io limit", "pids limit"} < lacking


def test_service_does_not_start_without_the_limits_that_its_configuration_asks_for(
    open_directory: Callable[[], Path],
) -> None:
    site = open_directory()
    init_authority(site / "certs", [], now=datetime.now(UTC))
    for path in (site / "certs", *(site / "certs").iterdir()):
        os.chown(path, UID, UID)
    config = write_configuration(site, {"worker": {"state_dir": f"{site}/home/state"}})
    arguments, environment = command(site, ["serve", "--config", str(config)])
    done = subprocess.run(
        arguments, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 80
    assert "cannot use the cpu controller" in done.stderr
    assert "systemd-run --user" in done.stderr
    config = write_configuration(site, {"cgroup": {"enable_controllers": []}})
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 78
    assert "worker.default_cpu_limit" in done.stderr
