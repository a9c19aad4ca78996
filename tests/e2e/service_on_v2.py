"""Prove the whole service on this host: the demonstration, jobs and limits, crashes, refusals.

As a script (root, Linux with the full cgroup v2 hierarchy, a Python that has the dependencies):

    python tests/e2e/service_on_v2.py [--change-sysctl] [PROBE ...]

It runs every probe, or those named; prints a line for each with what was measured; and exits with
1 if one failed. A probe that this host has no means for says so and counts as not failed.
`--change-sysctl` allows the one probe that switches user namespaces off for the whole host, for
some seconds. Times are taken from the jobs' own records, so that a slow start of Python does not
spoil them.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import trio
from attrs import evolve

if __name__ == "__main__":
    ROOT = Path(__file__).resolve().parents[2]
    SOURCE = str(ROOT / "src")
    sys.path[:0] = [SOURCE, str(ROOT)]
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [SOURCE, *filter(None, [os.environ.get("PYTHONPATH")])]
    )

from jobworker.cli.worker.embedded_service import EmbeddedService, open_embedded, program
from jobworker.client.client import Client
from jobworker.client.opening import open_client
from jobworker.errors import SandboxError
from jobworker.model.job import JobRecord, JobSpec, Limits, Usage
from jobworker.model.volumes import VolumeMount
from jobworker.server.startup.preparation import instance_name
from tests.e2e import kernel_hoards

MIB = 1 << 20
CGROUPS = Path("/sys/fs/cgroup")
HOARD_LIMIT = 64 * MIB
MOST_UNCOUNTED = 170 * MIB
"""What docs/threat-model.md says that a job held when the watch over kernel memory ended it."""
MAX_USER_NAMESPACES = Path("/proc/sys/user/max_user_namespaces")

_HOG = (
    "import os, time\nif os.fork() == 0: time.sleep(600)\nb = bytearray(256 << 20)\ntime.sleep(600)"
)
_SPIN = (
    "import os, time\nos.fork()\nend = time.monotonic() + 4\nwhile time.monotonic() < end: pass\n"
)
_BOMB = (
    "import os, time\nmade = 0\ntry:\n    while made < 500:\n"
    "        if os.fork() == 0: time.sleep(600)\n        made += 1\n"
    "except BlockingIOError: print(made, flush=True)\nos._exit(0)\n"
)


Alone = Callable[[], Awaitable[str]]
Served = Callable[[EmbeddedService, Client], Awaitable[str]]


class NotHere(Exception):
    """This host has no means for the probe; the text names what is missing."""


@contextmanager
def own_directory() -> Iterator[Path]:
    """A directory on disk that an unprivileged service may pass through."""
    path = Path(tempfile.mkdtemp(prefix="jobworker-e2e-", dir="/var/tmp"))
    try:
        yield path
    finally:
        shutil.rmtree(path)


@asynccontextmanager
async def connected(service: EmbeddedService, role: str = "admin") -> AsyncIterator[Client]:
    """A client with the certificate of `role`."""
    names = service.environment(role)
    async with open_client(
        service.address,
        ca=names["WORKER_CA_PATH"],
        certificate=names["WORKER_CERT_PATH"],
        key=names["WORKER_KEY_PATH"],
    ) as client:
        yield client


async def run(client: Client, spec: JobSpec) -> tuple[str, JobRecord]:
    """Run a job to its end: its output, and its record."""
    data = b""
    with (await client.run(spec, follow=True)).output() as output:
        async for chunk in output:
            data += chunk.data
    assert output.record is not None
    return data.decode(), output.record


def shell(script: str, timeout_seconds: float | None = None, **limits: int) -> JobSpec:
    """A shell script as a job."""
    return JobSpec(
        command=("sh", "-c", script), limits=Limits(**limits), timeout_seconds=timeout_seconds
    )


def python(code: str, **limits: int) -> JobSpec:
    """A piece of Python as a job."""
    return JobSpec(command=("python3", "-c", code), limits=Limits(**limits))


def seconds_of(job: JobRecord) -> float:
    """How long an ended job ran."""
    assert job.started_at is not None
    assert job.ended_at is not None
    return (job.ended_at - job.started_at).total_seconds()


def usage_of(job: JobRecord) -> Usage:
    """What an ended job has used."""
    assert job.usage is not None
    return job.usage


def groups(directory: Path) -> list[Path]:
    """The control groups of the service that has this directory."""
    name = instance_name(directory / "state")
    return [Path(path) for path, _, _ in os.walk(CGROUPS) if path.endswith(f"/{name}")]


def processes(words: str) -> list[int]:
    """Processes of this host whose command line holds `words`, this one aside."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if words.encode() in (process / "cmdline").read_bytes():
                found.append(int(process.name))
    return [pid for pid in found if pid != os.getpid()]


def attached_disks() -> int:
    """How many loop devices have a file behind them; the machine has no others than ours."""
    return len(list(Path("/sys/block").glob("loop*/loop/backing_file")))


def left_behind(directory: Path) -> list[str]:
    """What a service that has ended has left: groups, processes, mounts, the jobs' files."""
    left = [str(group) for group in groups(directory)]
    left += [f"process {pid}" for pid in processes(str(directory))]
    left += ["a mount"] * (str(directory) in Path("/proc/self/mountinfo").read_text())
    left += ["a disk"] * attached_disks()
    return left


async def until(condition: Callable[[], object], what: str, seconds: float = 30) -> None:
    """Wait for something outside of Trio's sight."""
    with trio.move_on_after(seconds):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.01)
        return
    raise AssertionError(f"not within {seconds} s: {what}")


def launcher_of(service: EmbeddedService) -> int:
    """The launcher's guard: the child whose command line says so."""
    pid = service.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    (launcher,) = [
        child
        for child in children
        if b"jobworker.sandbox.launcher.main" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]
    return int(launcher)


# --- the demonstration ----------------------------------------------------------------------


async def _demonstrate(prefix: list[str]) -> str:
    done = await trio.run_process(
        [*prefix, *program("worker"), "demo"],
        capture_stdout=True,
        stderr=subprocess.STDOUT,
        check=False,
    )
    text = done.stdout.decode(errors="replace")
    verdicts = [line.strip() for line in text.splitlines() if line.startswith(("  ok", "  FAIL"))]
    failed = [line for line in verdicts if line.startswith("FAIL")]
    assert not failed, "; ".join(failed)
    assert done.returncode == 0, text[-2000:]
    return "; ".join(line.removeprefix("ok").strip() for line in verdicts)


async def demo_in_a_plain_shell() -> str:
    """Every promise of `worker demo` holds, and it leaves nothing."""
    return await _demonstrate([])


async def demo_in_a_delegated_unit() -> str:
    """The same in a transient systemd unit with Delegate=yes."""
    if not Path("/run/systemd/system").exists():
        raise NotHere("systemd is not the init of this host")
    path = f"--setenv=PYTHONPATH={os.environ.get('PYTHONPATH', '')}"
    unit = ["systemd-run", "--wait", "--pipe", "--quiet", "--collect", "-p", "Delegate=yes", path]
    return await _demonstrate(unit)


# --- a running service ----------------------------------------------------------------------


async def cli_from_run_to_wait(service: EmbeddedService, _: Client) -> str:
    """The commands of worker-cli, their output and exit codes."""

    async def cli(*arguments: str) -> tuple[int, str]:
        done = await trio.run_process(
            [*program("worker-cli"), *arguments],
            env={**os.environ, **service.environment()},
            capture_stdout=True,
            check=False,
        )
        return done.returncode, done.stdout.decode()

    code, text = await cli("--json", "run", "sh", "-c", "echo out; exec sleep 600")
    assert code == 0, text
    number = str(json.loads(text)["id"])
    code, text = await cli("--json", "status", number)
    assert (code, json.loads(text)["state"]) == (0, "RUNNING"), text
    assert await cli("log", number) == (0, "out\n")
    code, text = await cli("--json", "stop", number)
    assert (code, json.loads(text)["state"]) == (0, "STOPPED"), text
    code, text = await cli("wait", number)
    assert code == 128 + signal.SIGKILL, (code, text)
    assert await cli("run", "-f", "sh", "-c", "echo two; exit 7") == (7, "two\n")
    return "run, status, log, stop, wait, run -f"


async def job_sees_itself_alone(_: EmbeddedService, client: Client) -> str:
    """Own processes, ids, control groups and mounts; nothing of the host's."""
    script = (
        "ls -d /proc/[0-9]*; cat /proc/self/cgroup; cut -d' ' -f5 /proc/self/mountinfo | sort -u; "
        "ls -A /sys /home /mnt; cat /etc/shadow; awk '{print $2}' /proc/self/uid_map"
    )
    text, job = await run(client, shell(script))
    lines = text.split("\n")
    outside = int(lines[-2])
    assert lines[0] == "/proc/1", text
    assert "0::/" in lines, text
    assert "/sys/fs/cgroup" not in lines, text
    assert "root:" not in text, text
    assert outside >= 100_000, text
    mounts = len([line for line in lines if line.startswith("/")])
    assert job.exit_code == 0, text
    return f"PID 1, cgroup /, root is {outside} outside, {mounts} mount points and processes"


async def oom_ends_the_whole_job(_: EmbeddedService, client: Client) -> str:
    """One process takes too much, and its sibling ends with it; the reason is told."""
    job = (await run(client, python(_HOG, memory_bytes=64 * MIB)))[1]
    assert (job.state.value, job.reason and job.reason.value) == ("FAILED", "oom"), job
    peak = usage_of(job).memory_peak_bytes
    assert peak <= 64 * MIB, peak
    assert seconds_of(job) < 60, job
    return f"reason oom after {seconds_of(job):.1f} s, peak {peak / MIB:.1f} of 64 MiB"


async def memory_file_systems_count(_: EmbeddedService, client: Client) -> str:
    """What a job writes to /dev/shm counts as its memory."""
    text, job = await run(
        client, shell("head -c 100000000 /dev/zero >/dev/shm/x; echo wrote", memory_bytes=32 * MIB)
    )
    assert (text, job.reason and job.reason.value) == ("", "oom"), (text, job)
    return "reason oom at 32 MiB"


async def spinners_share_half_a_core(_: EmbeddedService, client: Client) -> str:
    """The CPU limit is one for the job."""
    job = (await run(client, python(_SPIN, cpu_percent=50)))[1]
    percent = usage_of(job).cpu_ns / seconds_of(job) / 1e7
    assert 43 <= percent <= 55, percent
    return f"two spinners got {percent:.1f} % of a core in {seconds_of(job):.1f} s"


async def io_keeps_to_its_limit(_: EmbeddedService, client: Client) -> str:
    """Direct writes and reads and buffered writes; and the control without a limit."""
    create = "dd if=/dev/zero of=f bs=64k count=48"
    rates = {}
    # A job's root is thrown away with it, so fsync(2) there writes nothing: see `MountOverlay`.
    # What a job keeps in a volume does reach the disk.
    await client.make_volume("io", 32 * MIB)
    volumes = (VolumeMount(name="io"),)
    for name, script in (
        ("direct", f"{create} oflag=direct"),
        ("buffered", f"cd /volumes/io && {create} conv=fsync"),
    ):
        limited = evolve(shell(f"{script} 2>&1", io_bps=MIB), volumes=volumes)
        job = (await run(client, limited))[1]
        written = usage_of(job).write_bytes
        assert job.exit_code == 0, job
        assert written >= 3 * MIB, (name, written)
        # Writes that fit one slice of the throttle go at once, and so may end a little early.
        assert seconds_of(job) >= 2.5, (name, seconds_of(job))
        rates[name] = 3 / seconds_of(job)
        free = (await run(client, evolve(limited, limits=Limits())))[1]
        assert seconds_of(free) < seconds_of(job) / 2, (name, "control", seconds_of(free))
    text, job = await run(
        client,
        shell(f"{create} oflag=direct 2>&1; date +%s%N; dd if=f of=/dev/null bs=64k "
              "iflag=direct 2>&1; date +%s%N", io_bps=MIB),
    )  # fmt: skip
    before, after = (int(line) for line in text.split("\n") if line.isdigit())
    rates["read"] = 3e9 / (after - before)
    assert rates["read"] <= 1.2, rates
    return ", ".join(f"{name} {rate:.2f}" for name, rate in rates.items()) + " of 1 MiB/s"


async def limits_outlive_a_reload_of_systemd(service: EmbeddedService, client: Client) -> str:
    """systemd writes to the groups around ours; the limits of a running job stay."""
    if not Path("/run/systemd/system").exists():
        raise NotHere("systemd is not the init of this host")
    limits = Limits(cpu_percent=50, memory_bytes=64 * MIB, io_bps=MIB, processes=20)
    job = await client.run(JobSpec(command=("sleep", "600"), limits=limits))

    def armed() -> list[str]:
        (top,) = groups(service.directory)
        names = ("cpu.max", "memory.max", "io.max", "pids.max")
        # A spare in its scope has no limits; the job's scope is the one that has.
        texts = [[(scope / name).read_text() for name in names] for scope in top.glob("job-*")]
        return next(text for text in texts if text[3] == "20\n")

    before = armed()
    assert "rbps=1048576" in before[2], before
    await trio.run_process(["systemctl", "daemon-reload"])
    await trio.run_process(["systemd-run", "--wait", "--quiet", "--collect", "true"])
    assert armed() == before
    await job.stop()
    return f"in {groups(service.directory)[0].parent}"


async def fork_bomb_stops_at_its_limit(_: EmbeddedService, client: Client) -> str:
    """fork(2) fails inside; and with its first process the whole job ends."""
    text, job = await run(client, python(_BOMB, processes=20))
    assert (text, job.state.value) == ("19\n", "COMPLETED"), (text, job)
    return "19 forks of 20 processes"


async def stop_ends_daemons_that_ignore_sigterm(_: EmbeddedService, client: Client) -> str:
    """Grandchildren in sessions of their own that ignore SIGTERM go with the job."""
    marker = f"77{os.getpid()}"
    script = (
        "trap '' TERM\nfor i in 1 2 3; do setsid sh -c "
        f"\"trap '' TERM; (sleep {marker} &) ; sleep {marker}\" & done\n"
        "while true; do sleep 1; done"
    )
    job = await client.run(shell(script))
    words = f"sleep\0{marker}"
    await until(lambda: len(processes(words)) == 6, "six daemons")
    began = time.monotonic()
    ended = await job.stop(grace_seconds=1)
    took = time.monotonic() - began
    assert (ended.state.value, ended.signal) == ("STOPPED", signal.SIGKILL), ended
    assert processes(words) == []
    assert 1 <= took < 10, took
    return f"six, within {took:.2f} s, grace 1 s"


async def stop_does_not_wait_for_throttled_io(_: EmbeddedService, client: Client) -> str:
    """A job in the middle of minutes of delayed I/O is ended at once."""
    command = ("dd", "if=/dev/zero", "of=f", "bs=4M", "count=8", "oflag=direct")
    job = await client.run(JobSpec(command=command, limits=Limits(io_bps=65_536)))

    def delayed() -> bool:
        states = [
            Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
            for pid in processes("\0".join(command))
        ]
        return states == ["D"]

    await until(delayed, "a dd that waits for its disk")
    began = time.monotonic()
    await job.stop(grace_seconds=0.5)
    took = time.monotonic() - began
    assert took < 15, took
    return f"{took:.2f} s"


async def timeout_ends_the_job(_: EmbeddedService, client: Client) -> str:
    """The time-out is the job's reason."""
    job = (await run(client, shell("exec sleep 600", timeout_seconds=1)))[1]
    assert (job.state.value, job.reason and job.reason.value) == ("FAILED", "timeout"), job
    assert 1 <= seconds_of(job) < 5, seconds_of(job)
    return f"after {seconds_of(job):.2f} s of 1 s"


def _hoarder(kind: str) -> Served:
    async def probe(_: EmbeddedService, client: Client) -> str:
        """Kernel memory of this kind is bounded, whoever counts it."""
        await _calm()
        code = kernel_hoards.script(kind)
        spec = JobSpec(
            command=("python3", "-c", code),
            limits=Limits(memory_bytes=HOARD_LIMIT),
            network="none",
            timeout_seconds=400,
        )
        sight = kernel_hoards.Sight()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_watch, sight, code)
            text, job = await run(client, spec)
            nursery.cancel_scope.cancel()
        ending = f"{job.state.value} {job.reason.value if job.reason else ''}".strip()
        peak = usage_of(job).memory_peak_bytes
        line = (
            f"{ending} after {seconds_of(job):.1f} s {text.strip()}, peak {peak / MIB:.1f}, {sight}"
        )
        assert sight.in_group, f"the job was not seen: {line}"
        assert ending == ("COMPLETED" if kind == "names" else "FAILED oom"), (line, job.detail)
        is_counted = kind not in kernel_hoards.UNCOUNTED
        assert ("kernel's own" in job.detail) != is_counted, (line, job.detail)
        bound = HOARD_LIMIT + 64 * MIB if is_counted else MOST_UNCOUNTED
        assert max(peak, sight.on_host["kernel"]) <= bound, line
        return line

    probe.__name__ = f"hoard_of_{kind}"
    return probe


async def _watch(sight: kernel_hoards.Sight, code: str) -> None:
    group = None
    while True:
        with contextlib.suppress(OSError):  # it has just ended
            if group is None and (found := processes(code)):
                group = kernel_hoards.group_of(found[0])
            sight.look(group)
        await trio.sleep(0.1)


async def _calm() -> None:
    """What the job before held is given back."""
    last = kernel_hoards.host()

    for _ in range(30):
        await trio.sleep(1)
        now = kernel_hoards.host()
        if all(abs(now[name] - last[name]) < MIB for name in now):
            return
        last = now


async def ended_jobs_leave_no_groups(service: EmbeddedService, _: Client) -> str:
    """What stands in our group after all these jobs are the spares alone."""
    (top,) = groups(service.directory)

    def scopes() -> int:
        return len(list(top.glob("job-*")))

    await until(lambda: scopes() <= 2, "only spares")
    # One disk each, and that of the skeleton which all share: volumes go with their last job.
    await until(lambda: attached_disks() == scopes() + 1, "disks of spares only")
    return f"{scopes()} spares"


# --- crashes and refusals, each with services of its own ------------------------------------


async def _crash(victims: Callable[[EmbeddedService], list[int]], expected: str) -> str:
    marker = f"66{os.getpid()}"
    words = f"sleep\0{marker}"
    with own_directory() as directory:
        async with open_embedded(directory) as service, connected(service) as client:
            job = await client.run(shell(f"echo kept; setsid sleep {marker} & sleep {marker}"))
            await until(lambda: len(processes(words)) == 2, "the job's processes")
            written = directory / "state" / "service" / "spool" / str(job.id) / "stdout"
            # What is in the pipe alone is gone with those who have it open.
            await until(lambda: written.read_bytes() == b"kept\n", "its output")
            for pid in victims(service):
                os.kill(pid, signal.SIGKILL)
            with trio.fail_after(30):
                await service.process.wait()
            await until(lambda: processes(words) == [], "the end of the job's processes")
            await until(lambda: len(processes(str(directory))) == 0, "the launcher's end")
            first = left_behind(directory)
        async with open_embedded(directory) as service, connected(service) as client:
            lost = await client.job(job.id).status()
            assert (lost.state.value, lost.reason and lost.reason.value) == ("FAILED", expected)
            with client.job(job.id).output() as output:
                kept = b"".join([chunk.data async for chunk in output])
            assert kept == b"kept\n", kept
            text, _ = await run(client, shell("echo again"))
            assert text == "again\n"
        assert left_behind(directory) == []
    return f"left at once: {len(first)}; after the next start and end: nothing; reason {expected}"


async def killed_service() -> str:
    """The launcher takes the jobs along, and the next service tells what was lost."""
    return await _crash(lambda service: [service.process.pid], "lost")


async def killed_launcher() -> str:
    """Jobs end with the launcher, the service too; the next start clears away."""
    return await _crash(lambda service: [launcher_of(service)], "lost")


async def both_killed() -> str:
    """Nobody is left to clear away; the next start does."""
    return await _crash(lambda service: [launcher_of(service), service.process.pid], "lost")


async def without_user_namespaces() -> str:
    """A job is refused by step and with the remedy, the service goes on, and recovers."""
    before = MAX_USER_NAMESPACES.read_text()
    with own_directory() as directory:
        try:
            MAX_USER_NAMESPACES.write_text("0")
            async with open_embedded(directory) as service, connected(service) as client:
                began = time.monotonic()
                try:
                    await client.run(JobSpec(command=("true",)))
                except SandboxError as error:
                    refusal = error
                else:
                    raise AssertionError("the job was started")
                took = time.monotonic() - began
                assert refusal.data["step"] == "enter-user-namespace", refusal.data
                assert "user.max_user_namespaces" in refusal.remedy, refusal
                assert took < 5, took
                (job,) = await client.list()
                assert (job.reason and job.reason.value) == "start", job
                MAX_USER_NAMESPACES.write_text(before)
                text, _ = await run(client, shell("echo back"))
                assert text == "back\n"
        finally:
            MAX_USER_NAMESPACES.write_text(before)
        assert left_behind(directory) == []
    return f"{took * 1000:.0f} ms: {refusal}"


SERVED: tuple[Served, ...] = (
    cli_from_run_to_wait,
    job_sees_itself_alone,
    oom_ends_the_whole_job,
    memory_file_systems_count,
    spinners_share_half_a_core,
    io_keeps_to_its_limit,
    limits_outlive_a_reload_of_systemd,
    fork_bomb_stops_at_its_limit,
    stop_ends_daemons_that_ignore_sigterm,
    stop_does_not_wait_for_throttled_io,
    timeout_ends_the_job,
    *map(_hoarder, kernel_hoards.KINDS),
    ended_jobs_leave_no_groups,
)
ALONE: tuple[Alone, ...] = (
    killed_service,
    killed_launcher,
    both_killed,
    demo_in_a_plain_shell,
    demo_in_a_delegated_unit,
)


async def _probe(name: str, probe: Callable[[], Awaitable[str]]) -> bool:
    """Run a probe and print its line: whether it did not fail."""
    held = True
    try:
        line = f"ok      {name}: {await probe()}\n"
    except NotHere as missing:
        line = f"not here {name}: {missing}\n"
    except (Exception, trio.TooSlowError):  # noqa: BLE001 - the probes that follow shall run
        held = False
        line = f"FAILED  {name}\n{traceback.format_exc()}"
    sys.stdout.write(line)
    sys.stdout.flush()
    return held


async def _serve_probes(probes: list[Served]) -> list[bool]:
    held = []
    with own_directory() as directory:
        async with open_embedded(directory) as service, connected(service) as client:

            def bound(probe: Served) -> Alone:
                return lambda: probe(service, client)

            held = [await _probe(probe.__name__, bound(probe)) for probe in probes]

        async def nothing_is_left() -> str:
            left = left_behind(directory)
            assert left == [], left
            return "groups, processes, mounts, files"

        held.append(await _probe("nothing_is_left", nothing_is_left))
    return held


async def prove(wanted: list[str], *, change_sysctl: bool) -> bool:
    """Run the probes, all or those that are wanted: whether all of them held."""

    def chosen(name: str) -> bool:
        return not wanted or name in wanted

    held = []
    served = [probe for probe in SERVED if chosen(probe.__name__)]
    if served:
        held += await _serve_probes(served)
    alone = (*ALONE, without_user_namespaces) if change_sysctl else ALONE
    for probe in alone:
        if chosen(probe.__name__):
            held.append(await _probe(probe.__name__, probe))
    return all(held)


def main() -> int:
    """Run as a script: the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--change-sysctl", action="store_true")
    parser.add_argument("probe", nargs="*")
    options = parser.parse_args()
    known = {probe.__name__ for probe in (*SERVED, *ALONE)} | {without_user_namespaces.__name__}
    if unknown := set(options.probe) - known:
        parser.error(f"no such probe: {', '.join(sorted(unknown))}")
    if os.geteuid() != 0:
        parser.error("needs root: namespaces and control groups")
    if not (CGROUPS / "cgroup.controllers").exists():
        parser.error("needs the full cgroup v2 hierarchy at /sys/fs/cgroup")
    return 0 if trio.run(lambda: prove(options.probe, change_sysctl=options.change_sysctl)) else 1


if __name__ == "__main__":
    sys.exit(main())
