"""`worker demo`: start a service, run some jobs, measure their limits, and remove everything.

The program runs every command exactly as it prints it, with the real `worker-cli`. It marks each
promise that does not hold on this host as FAIL, and then exits with 1.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from types import FrameType

import trio
from attrs import define, field

from jobworker.cli.command_line.failures import one_line, print_note
from jobworker.cli.worker.embedded_service import EmbeddedService, open_embedded, program
from jobworker.cli.worker.guard import ENDING
from jobworker.config.settings import CONTROLLERS
from jobworker.errors import PermissionDenied
from jobworker.model.units import MEBIBYTE
from jobworker.sandbox.cgroup.files import groups_called
from jobworker.sandbox.cgroup.hierarchy import step_into_leaf
from jobworker.sandbox.check.host_check import findings as host_findings
from jobworker.sandbox.check.main import ProbeSettings
from jobworker.serialization.json_text import loads
from jobworker.server.startup.preparation import instance_name

LIMITS = {"cpu": "--max-cpu=50", "memory": "--max-memory=64M", "io": "--max-iobps=1000000"}
_DEFAULT_LIMITS = {
    "cpu": "default_cpu_limit",
    "memory": "default_memory_limit",
    "io": "default_io_limit",
    "pids": "default_process_limit",
}

_SPIN = (
    "import time; before, end = time.process_time(), time.monotonic() + 3\n"
    "while time.monotonic() < end: pass\n"
    "print(f'{(time.process_time() - before) / 3 * 100:.0f}')"
)
_DISK = "dd if=/dev/zero of=file bs=64k count=48 oflag=direct 2>&1 | tail -n 1"
_DISK_BYTES = 48 * 65_536
_GREED = "print('taking 200 MB', flush=True); taken = b'x' * 200_000_000; print('got it')"
_RIGHTS = (
    "id; cat /etc/shadow; mount -t tmpfs none /mnt; unshare --user true; "
    "echo x > /proc/sys/kernel/core_pattern"
)
_COUNTER = "for i in 1 2 3 4 5; do echo tick $i; sleep 0.3; done"


def _print(text: str = "") -> None:
    print(text, flush=True)  # noqa: T201 - this is what the program is for


@define(eq=False)
class _Demo:
    """The parts of the demonstration, and the promises that did not hold."""

    service: EmbeddedService
    missing: Mapping[str, str]
    """Controllers that this user cannot use on this host, each with the reason."""
    broken: list[str] = field(factory=list)

    @property
    def limits_asked(self) -> list[str]:
        """Options for the limits that can be enforced."""
        return [option for name, option in LIMITS.items() if name not in self.missing]

    async def cli(
        self, *arguments: str, role: str = "admin"
    ) -> "subprocess.CompletedProcess[bytes]":
        """Run worker-cli and capture its output."""
        return await trio.run_process(
            [*program("worker-cli"), *arguments],
            env={**os.environ, **self.service.environment(role)},
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )

    async def show(
        self, *arguments: str, role: str = "admin"
    ) -> "subprocess.CompletedProcess[bytes]":
        """Run worker-cli, and show the command and its output."""
        _print(f"$ worker-cli {' '.join(shlex.quote(argument) for argument in arguments)}")
        done = await self.cli(*arguments, role=role)
        _print((done.stdout + done.stderr).decode(errors="replace").rstrip("\n"))
        return done

    def check(self, promise: str, held: bool) -> None:
        """Show whether a promise held."""
        _print(f"  {'ok  ' if held else 'FAIL'}  {promise}")
        if not held:
            self.broken.append(promise)

    async def processes(self) -> None:
        """Show the host's processes, and those that a job sees."""
        _print("\n--- Isolation: the host's processes, and what a job sees of them\n")
        host = (await trio.run_process(["ps", "aux"], capture_stdout=True)).stdout.decode()
        lines = host.splitlines()
        _print("$ ps aux   # on the host")
        for line in lines[:4]:
            _print(line[:100])
        _print(f"… {len(lines) - 1} processes in all\n")
        done = await self.show("run", "--follow", "ps", "aux")
        seen = done.stdout.decode().splitlines()[1:]
        self.check(
            "the job sees one process, itself, as PID 1",
            [line.split()[1] for line in seen] == ["1"],
        )

    async def rights(self) -> None:
        """Show that a job is root inside and has no rights outside."""
        _print("\n--- Isolation: root inside is nobody outside\n")
        done = await self.show("run", "--follow", "sh", "-c", _RIGHTS)
        output = (done.stdout + done.stderr).decode()
        self.check("the job is root where it is", output.startswith("uid=0(root)"))
        hidden = "/etc/shadow: No such file" in output
        self.check("the host's secrets are not there", hidden)
        words = ("not permitted", "ermission denied", "Read-only file system")
        refused = sum(output.count(word) for word in words)
        self.check("the kernel refuses it mounts, namespaces and the host's settings", refused >= 3)

    async def limits(self) -> None:
        """Measure each limit; for one that cannot be enforced, show that a job is refused."""
        limits = " ".join(self.limits_asked) or "none that this user can enforce"
        _print(f"\n--- Limits: {limits}\n")
        # Load Python into the page cache, or the first job would read it at the I/O limit.
        await trio.run_process(["/usr/bin/python3", "-c", "import time"])
        for name, scene in (("cpu", self._cpu), ("io", self._io), ("memory", self._memory)):
            if name in self.missing:
                await self._refused(name)
            else:
                await scene()

    async def _refused(self, controller: str) -> None:
        _print(f"  -     {self.missing[controller]}")
        done = await self.cli("run", LIMITS[controller], "true")
        self.check(
            f"so a job that asks for {LIMITS[controller]} is refused",
            done.returncode != 0 and controller in done.stderr.decode(),
        )

    async def _cpu(self) -> None:
        spun = await self.cli("run", "-f", *self.limits_asked, "python3", "-c", _SPIN)
        percent = float(spun.stdout or b"0")
        measured = f"CPU: 3 s of a busy loop got {percent:.0f} % of a core"
        busy = " (this host is busy: without a limit it would get little more)"
        self.check(measured + (busy if percent < 45 else ""), percent <= 55)

    async def _io(self) -> None:
        began = time.monotonic()
        await self.cli("run", "-f", *self.limits_asked, "sh", "-c", _DISK)
        rate = _DISK_BYTES / (time.monotonic() - began)
        self.check(f"I/O: {_DISK_BYTES} bytes written at {rate:,.0f} bytes/s", rate <= 1_050_000)

    async def _memory(self) -> None:
        job = await self.cli("--json", "run", *self.limits_asked, "python3", "-c", _GREED)
        number = str(_field(job.stdout, "id"))
        waited = await self.cli("--json", "wait", number)
        reason, usage = _field(waited.stdout, "reason"), _field(waited.stdout, "usage")
        assert isinstance(usage, dict)
        peak = usage["memory_peak_bytes"] / MEBIBYTE
        self.check(
            f"memory: a job that takes 200 MB ended with reason {reason!r} at {peak:.0f} MiB",
            reason == "oom" and peak <= 64,
        )

    async def follow(self) -> None:
        """Show the lines of a counter as the job writes them."""
        _print("\n--- Output: live, as it is written\n")
        _print(f"$ worker-cli run --follow sh -c {shlex.quote(_COUNTER)}")
        command = [*program("worker-cli"), "run", "--follow", "sh", "-c", _COUNTER]
        moments = []
        process = await trio.lowlevel.open_process(
            command,
            stdout=subprocess.PIPE,
            env={**os.environ, **self.service.environment()},
        )
        assert process.stdout is not None
        try:
            async with process.stdout:
                async for piece in process.stdout:
                    for line in piece.decode().splitlines():
                        moments.append(time.monotonic())
                        _print(f"{line:10} (after {moments[-1] - moments[0]:.1f} s)")
            await process.wait()
        finally:
            if process.returncode is None:  # it would try for minutes to reconnect
                process.kill()
        spread = moments[-1] - moments[0] if moments else 0
        self.check("five lines came one by one", len(moments) == 5 and spread > 0.8)

    async def roles(self) -> None:
        """Show that a viewer may list jobs and may not run one."""
        _print("\n--- Access: the same commands with the viewer's certificate\n")
        listed = await self.show("list", role="viewer")
        refused = await self.show("run", "id", role="viewer")
        self.check("a viewer may list", listed.returncode == 0)
        self.check("a viewer may not run", refused.returncode == PermissionDenied.exit_code)


def _field(output: bytes, name: str) -> object:
    body = loads(output.decode())
    if isinstance(body, list):
        body = body[0]
    assert isinstance(body, dict)
    return body[name]


def _left_behind(service: EmbeddedService) -> list[str]:
    """Mounts, processes and control groups that an ended service has left on this host."""
    left = []
    mine = str(service.directory)
    if mine in Path("/proc/self/mountinfo").read_text():
        left.append("a mount")
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mine.encode() in (process / "cmdline").read_bytes():
                left.append(f"process {process.name}")
        except OSError:
            continue
    name = instance_name(service.directory / "state")
    left.extend(groups_called(name))
    return left


async def run_demo(*, stay: bool) -> int:
    """Run the demonstration, or with `stay` only the service until Ctrl-C. Returns the exit code.

    Each of the signals `ENDING` ends it and its service, also the SIGHUP of a closed terminal. A
    signal that is ignored at the start stays ignored, as nohup(1) needs it.
    """
    token = trio.lowlevel.current_trio_token()
    received: list[int] = []
    with trio.CancelScope() as scope:

        def end(number: int, _: FrameType | None) -> None:
            received.append(number)
            token.run_sync_soon(scope.cancel)

        before = {number: signal.getsignal(number) for number in ENDING}
        try:
            for number, action in before.items():
                if action is not signal.SIG_IGN:
                    signal.signal(number, end)
            return await _demonstrate(stay=stay)
        finally:
            for number, action in before.items():
                signal.signal(number, action)
    return 128 + received[0]


async def _demonstrate(*, stay: bool) -> int:
    step_into_leaf()
    missing = await _missing_controllers()
    directory = Path(tempfile.mkdtemp(prefix="jobworker-demo-", dir="/var/tmp"))
    try:
        async with open_embedded(directory, _settings(missing), guarded=True) as service:
            if stay:
                await _stay(service)
                return 1
            broken = await _scenes(service, missing)
        left = _left_behind(service)
    finally:
        shutil.rmtree(directory)
    _print("\n--- Clean-up\n")
    _print(f"  {'FAIL' if left else 'ok  '}  left behind: {', '.join(left) or 'nothing'}")
    if broken or left:
        _print("\nNot all of it held on this host; see the lines marked FAIL.")
        return 1
    _print("\nAll of it held. `worker demo --serve` keeps such a service running for you to try.")
    return 0


async def _missing_controllers() -> dict[str, str]:
    """The controllers that this user cannot use, with the reasons; tested by the probes."""
    found = await host_findings(ProbeSettings(CONTROLLERS, "", (), tempfile.gettempdir(), 0, 1))
    limits = {finding.name: finding for finding in found if finding.group == "limits"}
    tried = {name: limits.get(f"{name} limit") for name in CONTROLLERS}
    return {
        name: "user namespaces are missing" if finding is None else finding.detail
        for name, finding in tried.items()
        if finding is None or not finding.supported
    }


def _settings(missing: Collection[str]) -> dict[str, dict[str, object]]:
    """Settings for a service without the `missing` controllers."""
    enabled = [name for name in CONTROLLERS if name not in missing]
    defaults: dict[str, object] = {_DEFAULT_LIMITS[name]: 0 for name in missing}
    return {"cgroup": {"enable_controllers": enabled}, "worker": defaults} if missing else {}


async def _scenes(service: EmbeddedService, missing: Mapping[str, str]) -> list[str]:
    _print(f"A service listens on {service.address}, with certificates of its own.")
    gaps = [line.partition("this host: ")[2] for line in service.log_text().splitlines()]
    for gap in filter(None, gaps):
        _print(f"  on this host, for this user: {gap}")
    demo = _Demo(service, missing)
    await demo.processes()
    await demo.rights()
    await demo.limits()
    await demo.follow()
    await demo.roles()
    return demo.broken


async def _stay(service: EmbeddedService) -> None:
    """Print how to connect. Returns when the service ends by itself, after a line about it."""
    for name, value in service.environment().items():
        _print(f"export {name}={shlex.quote(value)}")
    _print("\n# Paste these lines into another terminal, then try: worker-cli run ps aux")
    _print(f"# worker-cli is in {Path(sys.executable).parent}. Ctrl-C ends the service.")
    code = await service.process.wait()
    fault = f"it or its guard ended with code {code if code >= 0 else 128 - code}"
    last = one_line("".join(service.log_text().splitlines()[-1:]))
    print_note(f"worker: cannot keep the service running: {fault}; its log ends with: {last}")
