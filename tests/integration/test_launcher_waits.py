"""The launcher goes on while a file system or a process that others need stands still."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobworker.sandbox import channel
from jobworker.sandbox.protocol.policy import LauncherPolicy
from jobworker.sandbox.service import launch
from jobworker.sandbox.service.launch import start_launcher

from .conftest import child_of, children_of, until
from .test_launcher import Service, make_policy  # noqa: F401 - a fixture

MIB = 1 << 20
_FREEZE, _THAW = 0xC0045877, 0xC0045878  # ioctl_fs(2)


class Disk:
    """A small ext4 file system of a directory's own, which can be made to stand still."""

    def __init__(self, directory: str) -> None:
        self._directory, self._image = directory, f"{directory}.ext4"
        with open(self._image, "wb") as image:
            image.truncate(256 * MIB)
        subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", self._image], check=True)
        subprocess.run(["mount", "-o", "loop", self._image, directory], check=True)
        os.rmdir(f"{directory}/lost+found")

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Whatever would write to it waits for the end of the block."""
        root = os.open(self._directory, os.O_RDONLY)
        fcntl.ioctl(root, _FREEZE, 0)
        try:
            yield
        finally:
            fcntl.ioctl(root, _THAW, 0)
            os.close(root)

    def close(self) -> None:
        """Unmount it; the launcher has ended."""
        subprocess.run(["umount", self._directory], check=True)
        os.unlink(self._image)


@pytest.fixture
def on_disks(
    make_policy: Callable[..., LauncherPolicy],  # noqa: F811
) -> Iterator[tuple[Service, Disk, Disk]]:
    """A launcher, and the file systems of its volumes and of its jobs' disks."""
    policy = make_policy()
    volumes, scratch = Disk(policy.volumes), Disk(policy.scratch)
    service = Service(start_launcher(policy), policy)
    yield service, volumes, scratch
    service.sock.close()
    assert service.leaves() == 0
    volumes.close()
    scratch.close()


def send(service: Service, number: int, operation: str, **fields: object) -> None:
    """Ask for something and wait for nothing."""
    channel.send(service.sock, {"id": number, "op": operation, **fields})


def test_volumes_disk_that_stands_still_keeps_no_job_waiting(
    on_disks: tuple[Service, Disk, Disk],
) -> None:
    service, volumes, _ = on_disks
    for name in ("old", "other"):
        assert (
            "ok" in service.ask("volume.create", 0, name=name, size_bytes=16 * MIB, thin=False)[0]
        )
    assert "ok" in service.spawn(1, "sleep", "600")[0]
    with volumes.frozen():
        send(service, 1000, "volume.remove", name="old")
        send(service, 1001, "volume.create", name="new", size_bytes=16 * MIB, thin=False)
        send(service, 1002, "volume.list")
        waits = {**service.fields("true"), "volumes": [["other", "/srv"]]}
        send(service, 1003, "spawn", job=2, **waits)
        assert "ok" in service.spawn(3, "true")[0], "another job starts"
        assert service.exit_of(3)["code"] == 0, "and ends"
        assert "ok" in service.ask("kill", 1)[0]
        assert service.exit_of(1)["signal"] == 9, "and is ended"
        assert service.ask("remove", 1)[0]["ok"] == {}
        error = service.ask("volume.remove", 0, name="old")[0]["error"]
        assert isinstance(error, dict)
        assert error["errno"] == 2, "it is on its way out"
    replies = [service.reply_to(number)[0] for number in (1000, 1001)]
    assert all("ok" in reply for reply in replies), replies
    assert service.exit_of(2)["code"] == 0
    told = service.ask("volume.list", 0)[0]["ok"]
    assert isinstance(told, dict)
    assert [volume["name"] for volume in told["volumes"]] == ["new", "other"]


def test_jobs_disk_that_stands_still_keeps_no_other_job_waiting(
    on_disks: tuple[Service, Disk, Disk],
) -> None:
    service, _, scratch = on_disks
    busy = "head -c 1000000 /dev/zero > /workspace/x; sync; echo; sleep 600"
    reply, pipes = service.spawn(1, "sh", "-c", busy)
    assert "ok" in reply
    assert os.read(pipes[0], 1) == b"\n"
    assert "ok" in service.spawn(2, "sleep", "600")[0]
    with scratch.frozen():
        send(service, 1000, "spawn", job=3, **{**service.fields("true"), "disk_bytes": 32 * MIB})
        for job in (1, 2):
            assert "ok" in service.ask("kill", job)[0]
            service.exit_of(job)
            assert service.ask("remove", job)[0]["ok"] == {}
        assert "error" in service.ask("usage", 1)[0]
    assert "ok" in service.reply_to(1000)[0]
    assert service.exit_of(3)["code"] == 0


def test_jobs_have_one_volume_at_the_same_moment_by_one_device(
    on_disks: tuple[Service, Disk, Disk],
) -> None:
    service, _, _ = on_disks
    assert "ok" in service.ask("volume.create", 0, name="v", size_bytes=16 * MIB, thin=False)[0]
    fields = {**service.fields("cat", "/proc/self/mountinfo"), "volumes": [["v", "/srv"]]}
    for job in (1, 2, 3, 4):
        send(service, 1000 + job, "spawn", job=job, **fields)
    devices = set()
    for _ in range(4):
        message, descriptors = service.receive()
        while "event" in message:
            message, descriptors = service.receive()
        assert "ok" in message, message
        with open(descriptors[0], encoding="utf-8") as out:
            os.set_blocking(out.fileno(), True)
            devices |= {line.split()[2] for line in out if " /srv " in line}
        os.close(descriptors[1])
    assert len(devices) == 1, "two devices before one file would ruin it"


def test_turns_are_timed_and_told(on_disks: tuple[Service, Disk, Disk]) -> None:
    service, _, _ = on_disks
    service.spawn(1, "true")
    service.exit_of(1)
    told = service.ask("turns", 0)[0]["ok"]
    assert isinstance(told, dict)
    assert told["turns"] > 3
    assert told["longest_ms"] >= 0
    again = service.ask("turns", 0)[0]["ok"]
    assert isinstance(again, dict)
    assert again["turns"] < told["turns"], "counted since it was asked for last"


@pytest.mark.parametrize("is_late", [True, False])
async def test_end_is_told_before_the_process_is_collected(
    make_policy: Callable[..., LauncherPolicy],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    *,
    is_late: bool,
) -> None:
    """Late is so late that it is not yet collected, however long the word of its end takes."""
    late = "from jobworker.sandbox.launcher import zombies; zombies.COLLECT_SECONDS = 600.0; "
    if is_late:
        path, call = launch._BOOTSTRAP.rsplit("; ", 2)[0], launch._BOOTSTRAP.rsplit("; ", 2)[1:]
        monkeypatch.setattr(launch, "_BOOTSTRAP", f"{path}; {late}{'; '.join(call)}")
    policy = make_policy()
    service = Service(start_launcher(policy), policy)
    launcher = child_of(service.process.pid)
    reply, pipes = service.spawn(1, "true")
    assert "ok" in reply
    assert service.exit_of(1)["code"] == 0
    channel.close_all(pipes)
    if is_late:
        assert zombies_of(launcher) >= 1, "what /proc showed of it would be forgotten in the loop"
    assert service.ask("remove", 1)[0]["ok"] == {}
    if not is_late:
        await until(lambda: zombies_of(launcher) == 0)
    service.sock.close()
    assert service.leaves() == 0


TRACER = """
import ctypes, sys
libc = ctypes.CDLL(None)
print(libc.ptrace(0x4206, int(sys.argv[1]), None, None), flush=True)  # PTRACE_SEIZE
sys.stdin.read()
"""


def test_ended_job_that_a_program_of_the_host_traces_keeps_no_other_job_waiting(
    on_disks: tuple[Service, Disk, Disk],
) -> None:
    service, _, _ = on_disks
    launcher = child_of(service.process.pid)
    reply, pipes = service.spawn(1, "sh", "-c", "echo; while :; do sleep 1; done")
    assert "ok" in reply
    os.read(pipes[0], 1)
    (first,) = [pid for pid, name in children_of(launcher).items() if name == "sh"]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", TRACER, str(first)], stdin=pipe, stdout=pipe, text=True
    ) as tracer:
        assert tracer.stdout is not None
        if tracer.stdout.readline() != "0\n":
            pytest.skip("this host lets no process trace another")
        assert "ok" in service.ask("kill", 1)[0]
        reply, more = service.spawn(2, "true")
        assert "ok" in reply
        assert service.exit_of(2)["code"] == 0
        assert 1 not in service._exits
        tracer.communicate()
    assert service.exit_of(1)["signal"] == signal.SIGKILL
    channel.close_all([*pipes, *more])


def zombies_of(pid: int) -> int:
    """The children of a process that have ended and were not collected."""
    count = 0
    for child in children_of(pid):
        with contextlib.suppress(OSError):
            count += "\nState:\tZ" in Path(f"/proc/{child}/status").read_text()
    return count
