"""Prove on a host with systemd that jobs outlive the service's restarts, and lose nothing.

As a script (root, systemd, cgroup v2; a throw-away machine, since it installs units):

    python tests/e2e/restart_under_systemd.py

It installs contrib/worker.service and contrib/worker-launcher.service with a `worker` of this very
Python, runs jobs that write numbered records, follows them, and has systemd restart, kill, stop and
start the service meanwhile. It prints what it saw, and exits with 1 if something did not hold.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import trio

if __name__ == "__main__":
    ROOT = Path(__file__).resolve().parents[2]
    SOURCE = str(ROOT / "src")
    sys.path.insert(0, SOURCE)

from jobworker.client.client import Client
from jobworker.client.opening import open_client
from jobworker.model.job import JobId, JobSpec, Stream
from jobworker.model.lifecycle import Reason, State
from jobworker.pki.administration import init_authority

JOBS = 8
UNITS = ("worker-launcher.service", "worker.service")
CONFIG, WORKER = Path("/etc/jobworker"), Path("/opt/jobworker/bin/worker")
LAUNCHER_GROUP = Path("/sys/fs/cgroup/system.slice/worker-launcher.service")
WRITER = """
trap 'end=1' TERM
i=0
while [ -z "$end" ]; do
    for _ in 1 2 3 4 5; do echo "o $i"; echo "e $i" >&2; i=$((i+1)); done
    sleep 0.2
done
echo "end $i"; echo "end $i" >&2
exit 7
"""


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def systemctl(*arguments: str) -> str:
    done = subprocess.run(
        ["systemctl", *arguments], capture_output=True, text=True, check=False, timeout=300
    )
    if done.returncode:
        journal = subprocess.run(
            ["journalctl", "--no-pager", "-n", "60", "-u", "worker", "-u", "worker-launcher"],
            capture_output=True,
            text=True,
            check=False,
        )
        raise AssertionError(f"systemctl {' '.join(arguments)}: {done.stderr}\n{journal.stdout}")
    return done.stdout.strip()


def show(unit: str, key: str) -> str:
    return systemctl("show", "--value", "-p", key, unit)


def install() -> None:
    """A `worker` of this Python, certificates, a configuration, the units."""
    paths = os.pathsep.join([SOURCE, os.environ.get("PYTHONPATH", "")])
    WORKER.parent.mkdir(parents=True, exist_ok=True)
    WORKER.write_text(
        f"#!/bin/sh\nPYTHONPATH='{paths}' exec {sys.executable} "
        '-c "from jobworker.cli.worker.main import main; main()" "$@"\n'
    )
    WORKER.chmod(0o755)
    CONFIG.mkdir(exist_ok=True)
    init_authority(CONFIG / "certs", [], now=datetime.now(UTC))
    (CONFIG / "worker.toml").write_text(
        '[server]\naddress = "127.0.0.1"\n[worker]\nmax_concurrent_jobs = 30\nstop_grace = "60s"\n'
        "[sandbox]\ndisk_limit = 16\n"
    )
    for unit in UNITS:
        target = Path("/etc/systemd/system") / unit
        target.write_text((ROOT / "contrib" / unit).read_text())
    systemctl("daemon-reload")


class Followed:
    """What a follower of one job has got, without gap or repeat."""

    def __init__(self, job: JobId) -> None:
        self.job, self.offset = job, 0
        self.data = {each: bytearray() for each in Stream}

    async def follow(self, client: Client) -> None:
        async for chunk in client.job(self.job).output():
            assert chunk.offset == self.offset, "a gap or a repeat"
            self.offset += len(chunk.data)
            self.data[chunk.stream] += chunk.data

    def check(self) -> int:
        counts = set()
        for stream, letter in ((Stream.STDOUT, "o"), (Stream.STDERR, "e")):
            *records, end = self.data[stream].decode().splitlines()
            assert records == [f"{letter} {n}" for n in range(len(records))]
            assert end == f"end {len(records)}"
            counts.add(len(records))
        (count,) = counts
        return count


def writers() -> dict[int, str]:
    """The jobs' first processes, and their control groups."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            status = (process / "status").read_text()
            inside = status.split("NSpid:")[1].splitlines()[0].split()[-1]
            is_first = inside == "1"  # not one that it has forked and that is about to be `sleep`
            if is_first and b"trap 'end=1' TERM" in (process / "cmdline").read_bytes():
                found[int(process.name)] = (process / "cgroup").read_text().strip()
    return found


async def act(what: str, action: Callable[[], object], client: Client) -> None:
    """Do something to the service: the same jobs are there then, and the client is served."""
    before, began = writers(), time.monotonic()
    await trio.to_thread.run_sync(action)
    with trio.fail_after(120):
        listed = await client.list(states=[State.RUNNING])
    assert len(listed) == JOBS, listed
    assert writers() == before, "the same processes in the same groups"
    say(f"ok      {what}: {JOBS} jobs went on, served again after {time.monotonic() - began:.1f} s")


async def scenario() -> None:
    address = "127.0.0.1:50051"
    certs = CONFIG / "certs"
    async with open_client(
        address,
        ca=certs / "ca-cert.pem",
        certificate=certs / "admin-client-cert.pem",
        key=certs / "admin-client-key.pem",
    ) as client:
        spec = JobSpec(command=("sh", "-c", WRITER))
        followed = [Followed((await client.run(spec)).id) for _ in range(JOBS)]
        groups = set(writers().values())
        assert len(groups) == JOBS, groups
        prefix = "0::/system.slice/worker-launcher.service/jobworker-"
        assert all(group.startswith(prefix) for group in groups), groups
        say("ok      each job is in a control group of its own below the launcher's unit")
        async with trio.open_nursery() as nursery:
            for each in followed:
                nursery.start_soon(each.follow, client)
            await act("systemctl restart", lambda: systemctl("restart", "worker"), client)
            await act("systemctl kill -s KILL", kill, client)
            await act("stop, and start", stop_and_start, client)
            async with trio.open_nursery() as stops:
                for each in followed:
                    stops.start_soon(stop, client, each.job)
        counts = [each.check() for each in followed]
        say(f"ok      {JOBS} jobs, {sum(counts)} records each way, every sequence complete")
        await kill_launcher(client)


def kill() -> None:
    pid = show("worker", "MainPID")
    systemctl("kill", "-s", "KILL", "--kill-who=main", "worker")
    until_served(pid)


def until_served(before: str) -> None:
    """Wait for systemd to have started another main process that is ready."""
    deadline = time.monotonic() + 120
    while show("worker", "MainPID") in ("0", before) or show("worker", "ActiveState") != "active":
        assert time.monotonic() < deadline, systemctl("status", "worker")
        time.sleep(0.3)


def fail_first() -> None:
    """Start with a configuration that is wrong for longer than systemd's own patience."""
    config = CONFIG / "worker.toml"
    right = config.read_text()
    config.write_text("[server\n")
    systemctl("start", "--no-block", "worker")
    deadline = time.monotonic() + 300
    while int(show("worker-launcher", "NRestarts") or 0) < 7:
        assert time.monotonic() < deadline, show("worker-launcher", "NRestarts")
        time.sleep(0.3)
    config.write_text(right)
    until_served("0")
    say("ok      a launcher that could not start at first: both units came up by themselves")


def stop_and_start() -> None:
    systemctl("stop", "worker")
    assert show("worker", "Result") == "success", show("worker", "Result")
    systemctl("start", "worker")


async def stop(client: Client, job: JobId) -> None:
    record = await client.job(job).stop()
    assert (record.state, record.exit_code) == (State.STOPPED, 7), record


async def kill_launcher(client: Client) -> None:
    """The launcher's end ends its jobs, and both units come back by themselves."""
    job = await client.run(JobSpec(command=("sleep", "1000")))
    before = show("worker", "MainPID")
    await trio.to_thread.run_sync(
        systemctl, "kill", "-s", "KILL", "--kill-who=main", "worker-launcher"
    )
    await trio.to_thread.run_sync(until_served, before)
    record = await client.job(job.id).status()
    assert record.reason is Reason.LOST, record
    assert (await (await client.run(["true"])).wait()).exit_code == 0
    say("ok      a killed launcher: its job is lost and told so, both units came back, jobs run")


def main() -> int:
    """Run as a script: the exit code."""
    if os.geteuid() != 0 or not Path("/run/systemd/system").exists():
        sys.stderr.write("needs root and systemd\n")
        return 2
    install()
    fail_first()
    assert show("worker-launcher", "ActiveState") == "active"
    say(f"ok      started: systemd {show('worker', 'StatusText')}")
    try:
        trio.run(scenario)
        systemctl("stop", "worker-launcher")
        assert show("worker", "ActiveState") == "inactive", "it goes with the launcher"
        assert not list(LAUNCHER_GROUP.rglob("jobworker-*"))
        assert not list(Path("/var/lib/jobworker/scratch").iterdir())
        say("ok      stopped: no control group, process or file of a job is left")
    except BaseException:
        subprocess.run(
            ["journalctl", "--no-pager", "-n", "100", "-u", "worker", "-u", "worker-launcher"],
            check=False,
        )
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
