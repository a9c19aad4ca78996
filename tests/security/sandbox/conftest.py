"""Attempts made three times: on the host, inside a job, and inside a job whose filter allows all.

The first is the control: the same program, as root, outside. The last shows what holds without
the system-call filter, by namespaces, capabilities and mounts alone: one mistake in one layer is
not to be enough.
"""

import ctypes
import json
import os
import socket
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio
from attrs import frozen

from jobworker.cli.worker.embedded_service import EmbeddedService
from jobworker.sandbox.seccomp.libseccomp import number_of

from ...integration.conftest import (
    _needs_root,
    admin,
    child_of,
    open_directory,
    running,
    service,
)
from ...integration.wire import open_wire

__all__ = ["_needs_root", "admin", "open_directory", "service"]

HERE = Path(__file__).parent
PROFILE = HERE.parents[2] / "etc" / "seccomp.toml"
NEIGHBOUR = str(1_000_000 + os.getpid())
"""How long the job sleeps that is attacked; no other run of these tests says the same."""
MODULES = ("attempts_files", "attempts_calls")


def known_calls() -> dict[str, int]:
    """Every system call that the profile speaks of and this machine has, with its number."""
    profile = tomllib.loads(PROFILE.read_text())
    found: dict[str, int] = dict(profile["numbers"])
    for rule in (*profile["allow"], *profile["refuse"]):
        for call in rule["calls"]:
            if call not in found and (number := number_of(call, os.uname().machine)) is not None:
                found[call] = number
    return found


def _join_a_session_keyring() -> None:
    """Have a session keyring with a key in it, as a log-in or systemd would give the service one.

    At import: threads have the keyring of the one that made them, and services are started by
    threads that live on.
    """
    libc, numbers = ctypes.CDLL(None), known_calls()
    libc.syscall(numbers["keyctl"], 1, None)
    libc.syscall(numbers["add_key"], b"user", b"host-canary", b"secret", 6, -3)


_join_a_session_keyring()


@pytest.fixture(scope="session")
def bare(open_directory: Callable[[], Path]) -> Iterator[EmbeddedService]:
    """A service whose jobs may make every system call: the layers below the filter, alone."""
    directory = open_directory()
    calls = ", ".join(f'"{call}"' for call in known_calls())
    numbers = "".join(f"{call} = {n}\n" for call, n in known_calls().items() if n >= 424)
    (directory / "all.toml").write_text(
        f"newest_call = 469\n[numbers]\n{numbers}"
        f'[[allow]]\nwhat = "everything"\ncalls = [{calls}]\n'
    )
    settings = {"seccomp_profile": str(directory / "all.toml")}
    with running(directory, {"sandbox": settings}) as held:
        yield held


@frozen(kw_only=True)
class Targets:
    """What there is on the host to attack; all of it must be unharmed at the end."""

    canary: Path
    processes: dict[str, int]
    abstract: str
    socket: str

    def given(self) -> str:
        """The targets as an attempt takes them."""
        return json.dumps(
            {
                "numbers": known_calls(),
                "newest_call": 469,
                "canary": str(self.canary),
                "handle_of": "/usr/bin",
                "pids": self.processes,
                "abstract": self.abstract,
                "socket": self.socket,
            }
        )


@pytest.fixture(scope="session")
def targets(service: EmbeddedService) -> Iterator[Targets]:
    """A file, processes and sockets of the host; and a job beside the one that attacks."""
    with ExitStack() as stack:
        canary = service.directory / "canary"
        canary.write_text("canary\n")
        process = stack.enter_context(subprocess.Popen(["sleep", "100000"]))
        stack.callback(process.kill)
        abstract = f"jobworker-canary-{os.getpid()}"
        path = str(service.directory / "canary.socket")
        for address in ("\0" + abstract, path):
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(address)
            listener.listen(64)
        neighbour = trio.run(_start_neighbour, service)
        stack.callback(trio.run, _stop, service, neighbour)
        guard = child_of(service.process.pid)
        processes = {
            "canary": process.pid,
            "service": service.process.pid,
            "launcher": child_of(guard),
            "neighbour": _pid_of(f"sleep\0{NEIGHBOUR}\0".encode()),
        }
        yield Targets(canary=canary, processes=processes, abstract=abstract, socket=path)
        assert canary.read_text() == "canary\n"
        assert process.poll() is None
        assert service.process.poll() is None


async def _start_neighbour(service: EmbeddedService) -> int:
    async with open_wire(service) as wire:
        return await wire.start("sleep", NEIGHBOUR)


async def _stop(service: EmbeddedService, job: int) -> None:
    async with open_wire(service) as wire:
        status = await wire.call("job.status", id=job)
        await wire.call("job.stop", id=job)
        assert "RUNNING" in str(status), "the neighbour has been harmed"


def _pid_of(command: bytes) -> int:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes() == command:
                return int(path.parent.name)
        except OSError:
            continue
    raise AssertionError(f"no process {command!r}")


def program_of(module: str) -> str:
    """The attempts of a module as one program that needs no file."""
    base, attempts = ((HERE / f"{name}.py").read_text() for name in ("attempt", module))
    return (
        "import sys, types\n"
        "sys.modules['attempts'] = types.ModuleType('attempts')\n"
        "base = sys.modules['attempts.attempt'] = types.ModuleType('attempts.attempt')\n"
        f"exec(compile({base!r}, 'attempt', 'exec'), base.__dict__)\n"
        f"exec(compile({attempts!r}, {module!r}, 'exec'), {{'__package__': 'attempts'}})\n"
        "base.main()\n"
    )


async def _in_job(service: EmbeddedService, module: str, given: str) -> dict[str, str]:
    async with open_wire(service) as wire:
        out, err, job = await wire.run(
            "/usr/bin/python3", "-c", program_of(module), environment={"GIVEN": given}
        )
        assert job["exit_code"] == 0, (err, job)
        found = json.loads(out)
        assert isinstance(found, dict)
        return found


@frozen(kw_only=True)
class Outcomes:
    """What came of each attempt, by its name."""

    outside: dict[str, str]
    inside: dict[str, str]
    unfiltered: dict[str, str]


@pytest.fixture(scope="session")
def outcomes(service: EmbeddedService, bare: EmbeddedService, targets: Targets) -> Outcomes:
    """All attempts, made once in each of the three places."""
    made: list[dict[str, str]] = [{}, {}, {}]
    for module in MODULES:
        done = subprocess.run(
            ["/usr/bin/python3", "-c", program_of(module)],
            env={"GIVEN": targets.given(), "OUTSIDE": "1", "PATH": os.environ["PATH"]},
            capture_output=True,
            check=True,
            timeout=100,
        )
        made[0].update(json.loads(done.stdout))
        made[1].update(trio.run(_in_job, service, module, targets.given()))
        made[2].update(trio.run(_in_job, bare, module, targets.given()))
    return Outcomes(outside=made[0], inside=made[1], unfiltered=made[2])
