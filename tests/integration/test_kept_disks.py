"""The disk of an ended job takes no room, whatever another job keeps of it."""

import errno
import os
from collections.abc import Callable, Iterator

import pytest

from jobworker.sandbox.launcher.sweepers import MAX_KEPT_DISKS
from jobworker.sandbox.protocol.policy import LauncherPolicy
from jobworker.sandbox.service.launch import start_launcher

from .conftest import until
from .test_launcher import Service, make_policy, service  # noqa: F401 - fixtures
from .test_launcher_waits import Disk

MIB = 1 << 20

KEEPER = """
import mmap, os, socket
door, near, far = socket.socket(socket.AF_UNIX), *socket.socketpair()
door.bind("/srv/door")
door.listen()
print("open", flush=True)
kept = []
while True:
    giver = door.accept()[0]
    file, directory, other = socket.recv_fds(giver, 1, 3)[1]
    kept.append(mmap.mmap(file, 0, prot=mmap.PROT_READ))
    os.fchdir(directory)
    socket.send_fds(near, [b"-"], [other])
    for descriptor in (file, directory, other): os.close(descriptor)
    giver.send(b"-")
"""
"""Keeps a mapped file, a working directory and a descriptor in flight."""

GIVER = """
import os, socket
file = os.open("/tmp/big", os.O_RDWR | os.O_CREAT)
os.write(file, os.urandom(1 << 20) * 40)
os.fsync(file)
keeper = socket.socket(socket.AF_UNIX)
keeper.connect("/srv/door")
socket.send_fds(keeper, [b"-"], [file, os.open("/tmp", os.O_RDONLY), os.open("/etc", os.O_RDONLY)])
keeper.recv(1)
"""


@pytest.fixture(params=[True, False], ids=["sparse", "reserved"])
def on_a_disk(
    make_policy: Callable[..., LauncherPolicy],  # noqa: F811
    request: pytest.FixtureRequest,
) -> Iterator[Service]:
    """A launcher that alone has the file system of its jobs' disks."""
    policy = make_policy()._replace(overcommit=request.param)
    scratch = Disk(policy.scratch)
    made = Service(start_launcher(policy), policy)
    yield made
    made.sock.close()
    assert made.leaves() == 0
    scratch.close()


async def test_ended_jobs_disk_takes_no_room_while_another_keeps_it(on_a_disk: Service) -> None:
    assert "ok" in on_a_disk.ask("volume.create", 0, name="v", size_bytes=16 * MIB, thin=False)[0]
    volumes = [["v", "/srv"]]
    reply, pipes = on_a_disk.spawn(1, "python3", "-c", KEEPER, volumes=volumes)
    assert "ok" in reply
    assert os.read(pipes[0], 5) == b"open\n"

    def taken() -> int:
        """MiB that disks take, in all."""
        disk = os.statvfs(on_a_disk.policy.scratch)
        return (disk.f_blocks - disk.f_bfree) * disk.f_frsize // MIB

    before = taken()
    for job in (2, 3):
        assert "ok" in on_a_disk.spawn(job, "python3", "-c", GIVER, volumes=volumes)[0]
        assert on_a_disk.exit_of(job)["code"] == 0
        assert on_a_disk.ask("remove", job)[0]["ok"] == {}
    await until(lambda: taken() <= before + 4)
    assert "ok" in on_a_disk.ask("kill", 1)[0]
    on_a_disk.exit_of(1)


async def test_no_further_job_gets_a_volume_while_too_many_disks_are_kept(
    service: Service,  # noqa: F811
) -> None:
    assert "ok" in service.ask("volume.create", 0, name="v", size_bytes=16 * MIB, thin=False)[0]
    volumes = [["v", "/srv"]]
    reply, pipes = service.spawn(1, "python3", "-c", KEEPER, volumes=volumes)
    assert "ok" in reply
    assert os.read(pipes[0], 5) == b"open\n"
    giver = GIVER.replace("* 40", "")
    for job in range(2, 2 + MAX_KEPT_DISKS):
        assert "ok" in service.spawn(job, "python3", "-c", giver, volumes=volumes)[0]
        assert service.exit_of(job)["code"] == 0
        assert service.ask("remove", job)[0]["ok"] == {}

    def refusal() -> object:
        reply, _ = service.spawn(50, "true", volumes=volumes)
        if "error" not in reply:
            service.exit_of(50)
            service.ask("remove", 50)
        return reply.get("error")

    await until(lambda: refusal() is not None)
    assert refusal() == {"step": "volume", "errno": errno.ETOOMANYREFS, "detail": "v"}
    assert "ok" in service.spawn(51, "true")[0], "a job without volumes starts"
    service.exit_of(51)
    assert "ok" in service.ask("kill", 1)[0]
    service.exit_of(1)
    await until(lambda: refusal() is None)
