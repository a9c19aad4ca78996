"""A real service for the tests: one for the whole run, in a process of its own."""

import os
import shutil
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import apsw
import pytest
import trio

from jobworker.cli.worker.embedded_service import EmbeddedService
from jobworker.config.settings import DEFAULT_PROGRAMS
from jobworker.sandbox.cgroup.files import groups_called
from jobworker.sandbox.disk.images import label_of
from jobworker.sandbox.fork_server import NAME
from jobworker.server.startup import configuration_reader
from jobworker.server.startup.preparation import instance_name

from ..services import open_embedded
from .wire import Wire, open_wire


@pytest.fixture(autouse=True)
def _needs_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: namespaces and control groups")


@pytest.fixture(scope="session")
def open_directory() -> Iterator[Callable[[], Path]]:
    """Makes directories on disk that an unprivileged service may pass through."""
    made: list[str] = []

    def make() -> Path:
        made.append(tempfile.mkdtemp(prefix="jobworker-test-", dir="/var/tmp"))
        os.chmod(made[-1], 0o755)
        return Path(made[-1])

    yield make
    deadline = time.monotonic() + 20
    while (left := [path for path in made if _has_disks(Path(path))]) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.05)  # the kernel lets go of them on its own
    for path in made:
        shutil.rmtree(path)
    assert left == [], "disks that nobody has detached"


async def until(condition: Callable[[], object], seconds: float = 20) -> None:
    """Wait for something outside of Trio's sight, such as a file that a job makes."""
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.005)


@contextmanager
def locked_history(directory: Path) -> Iterator[apsw.Connection]:
    """Hold the write lock of a service's history, as a backup by another program does."""
    with closing(apsw.Connection(str(directory / "state" / "service" / "history.db"))) as other:
        other.set_busy_timeout(30_000)  # the service writes too
        other.execute("BEGIN IMMEDIATE")
        yield other


T = TypeVar("T")
QUIET_SECONDS = 2.5
"""How long a launcher does the same before it is taken to be at rest. It collects an ended job
after `zombies.COLLECT_SECONDS`, and its fork server makes and clears away after the answer."""


def settled(look: Callable[[], T], quiet_seconds: float = QUIET_SECONDS) -> T:
    """What `look` tells once it has told the same for so long: to compare with later."""
    last, since = look(), time.monotonic()
    deadline = since + 60
    while time.monotonic() < min(deadline, since + quiet_seconds):
        time.sleep(0.02)
        now = look()
        if now != last:
            last, since = now, time.monotonic()
    return last


def children_of(pid: int) -> dict[int, str]:
    """The children of a process, by all of its threads, and their names."""
    found = {}
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            with suppress(OSError):  # it has just been collected
                found[int(child)] = Path(f"/proc/{child}/comm").read_text().rstrip("\n")
    return found


def child_of(pid: int) -> int:
    """The one child of a process, the service's reader aside: the guard, below it the launcher."""
    (child,) = [
        child for child, name in children_of(pid).items() if name != configuration_reader.NAME
    ]
    return child


def fork_server_of(launcher: int) -> int:
    """The process that makes a launcher's processes.

    What it makes has its name at first. But a child that becomes a job has a process namespace of
    its own, and the process of a chore closes what it has of the fork server.
    """
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        named = [pid for pid, name in children_of(launcher).items() if name == NAME]
        makers = [pid for pid in named if _is_fork_server(pid, launcher)]
        if len(makers) == 1:
            return makers[0]
        time.sleep(0.01)  # another one is on its way, or a chore has just been cloned
    raise AssertionError("no fork server")


def _is_fork_server(pid: int, launcher: int) -> bool:
    with suppress(OSError):
        if os.readlink(f"/proc/{pid}/ns/pid") == os.readlink(f"/proc/{launcher}/ns/pid"):
            opened = Path(f"/proc/{pid}/fd").iterdir()
            return any("memfd:trampoline" in os.readlink(each) for each in opened)
    return False


def spares_of(launcher: int) -> list[int]:
    """The children that wait for a job, and that the launcher has heard of from its fork server."""
    named = [pid for pid, name in children_of(launcher).items() if name.startswith("memfd:tramp")]
    known = _pids_with_a_descriptor(launcher) if named else set[int]()
    return [pid for pid in named if pid in known and _sleeps(pid)]


def _pids_with_a_descriptor(pid: int) -> set[int]:
    found = set[int]()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):  # just closed
            if "pidfd" in os.readlink(link):
                info = Path(f"/proc/{pid}/fdinfo/{link.name}").read_text()
                found |= {int(line.split()[1]) for line in info.splitlines() if line[:4] == "Pid:"}
    return found


def _sleeps(pid: int) -> bool:
    """Whether a process waits: a spare has told before that it is ready."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ST"
    return False


def size_of_this_run(mebibytes: int) -> int:
    """The size of a disk that no other run of these tests on this host gives to one."""
    return (mebibytes << 20) + (1 + os.getpid() % 1000) * 4096


def named_child_of(pid: int, name: str) -> int:
    """The first child of a process that has this name."""
    for child, its_name in children_of(pid).items():
        if its_name == name:
            return child
    raise LookupError(f"{pid} has no child {name}")


def disks_in(directory: Path) -> list[str]:
    """The loop devices of a service's directory: of volumes by their file, of jobs by their label.

    `directory` is that of the service, or the one for its jobs' disks.
    """
    labels = {label_of(str(each)) for each in (directory, directory / "state" / "scratch")}
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        name = backing.parts[3]
        with suppress(OSError):  # just detached
            if backing.read_text().startswith(f"{directory}/") or _label(name) in labels:
                found.append(name)
    return found


def _has_disks(directory: Path) -> bool:
    """Whether a service or a launcher of this directory has left a disk."""
    return bool(disks_in(directory) or disks_in(directory / "scratch"))


def _label(device: str) -> str:
    """The label of the ext4 on a device: s_volume_name of its superblock."""
    with open(f"/dev/{device}", "rb", buffering=0) as file:
        return os.pread(file.fileno(), 16, 1024 + 0x78).rstrip(b"\0").decode(errors="replace")


def disks_of_size(size: int) -> int:
    """How many disks of a size there are on this host: a job's, where the size is like no other.

    The file behind a job's disk has no name.
    """
    sectors = str(size // 512)
    found = 0
    for path in Path("/sys/block").glob("loop*/size"):
        with suppress(OSError):  # just detached
            found += path.read_text().strip() == sectors
    return found


def left_behind(directory: Path) -> list[str]:
    """Control groups, disks and processes of a service that has ended."""
    name = instance_name(directory / "state")
    left = groups_called(name)
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(directory).encode() in (process / "cmdline").read_bytes():
                left.append(f"process {process.name}")
        except OSError:
            continue
    scratch = directory / "state" / "scratch"
    left.extend(str(path) for path in scratch.iterdir())
    left.extend(disks_in(directory))
    return left


@contextmanager
def running(
    directory: Path, extra: Mapping[str, Mapping[str, object]]
) -> Iterator[EmbeddedService]:
    """A service in `directory` while the block lasts; at the end nothing of it may be left."""
    ready, stop = threading.Event(), trio.Event()
    held: list[tuple[EmbeddedService, trio.lowlevel.TrioToken]] = []
    faults: list[BaseException] = []

    async def hold() -> None:
        async with open_embedded(directory, extra) as made:
            held.append((made, trio.lowlevel.current_trio_token()))
            ready.set()
            await stop.wait()

    def serve() -> None:
        try:
            trio.run(hold)
        except BaseException as fault:  # noqa: BLE001 - told in the test's own thread
            faults.append(fault)
        finally:
            ready.set()

    thread = threading.Thread(target=serve)
    thread.start()
    ready.wait()
    if faults:
        raise faults[0]
    yield held[0][0]
    trio.from_thread.run_sync(stop.set, trio_token=held[0][1])
    thread.join()
    assert not faults
    assert left_behind(directory) == []


@pytest.fixture(scope="session")
def service(open_directory: Callable[[], Path]) -> Iterator[EmbeddedService]:
    """A running service, one for the whole run."""
    if os.geteuid() != 0:
        pytest.skip("needs root: namespaces and control groups")
    settings: dict[str, Mapping[str, object]] = {
        "worker": {"max_concurrent_jobs": 60},
        "sandbox": {"programs": DEFAULT_PROGRAMS},
    }
    with running(open_directory(), settings) as made:
        yield made


@pytest.fixture
async def admin(service: EmbeddedService) -> AsyncIterator[Wire]:
    """A connection with the admin's certificate."""
    async with open_wire(service) as wire:
        yield wire


@pytest.fixture
async def viewer(service: EmbeddedService) -> AsyncIterator[Wire]:
    """A connection with the viewer's certificate."""
    async with open_wire(service, "viewer") as wire:
        yield wire
