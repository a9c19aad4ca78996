"""The root that a job sees: its own to change, the host's to keep, and gone at the end."""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from jobworker.cli.worker.embedded_service import EmbeddedService
from jobworker.errors import HostUnsupported

from ..services import open_embedded
from .conftest import disks_in, left_behind, until
from .wire import Refused, Wire, open_wire

MIB = 1 << 20


@contextmanager
def mounted(kind: str, path: Path) -> Iterator[None]:
    """Mount an empty file system for a while."""
    subprocess.run(["mount", "-t", kind, "canary", path], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", path], check=True)


async def test_host_files_belong_to_root_inside(admin: Wire) -> None:
    out, err, _ = await admin.run(
        "stat",
        "-c",
        "%U:%G %a %n",
        "/",
        "/usr/bin/env",
        "/etc/passwd",
        "/tmp",
        "/root",
        "/dev/null",
    )
    assert out.splitlines() == [
        *("root:root 755 /", "root:root 755 /usr/bin/env", "root:root 644 /etc/passwd"),
        *("root:root 1777 /tmp", "root:root 700 /root", "root:root 666 /dev/null"),
    ], err
    host = os.stat("/usr/bin/env")
    assert (host.st_uid, host.st_gid) == (0, 0), "the control: so they do on the host"


async def test_changes_are_the_jobs_alone(admin: Wire) -> None:
    places = ("/usr/bin", "/usr/lib", "/etc", "/opt", "/var/lib/dpkg", "/srv", "/home")
    before = {name: os.lstat(name).st_mtime_ns for name in (*places, "/etc/hosts")}
    script = (
        "set -e; for place in "
        + " ".join(places)
        + '; do echo canary > "$place/jobworker-canary"; done; echo canary >> /etc/hosts; '
        "chmod 700 /usr/bin/env; mv /usr/games /usr/played; rm -rf /usr/include; "
        "chown 1000:1000 /usr/bin/id; ls -d /usr/played; stat -c %u /usr/bin/id; "
        "cat /usr/lib/jobworker-canary"
    )
    mode = os.stat("/usr/bin/env").st_mode
    out, err, job = await admin.run("sh", "-c", script)
    assert (out, err, job["exit_code"]) == ("/usr/played\n1000\ncanary\n", "", 0)
    assert {name: os.lstat(name).st_mtime_ns for name in before} == before
    assert os.stat("/usr/bin/env").st_mode == mode
    assert Path("/usr/include").exists()
    out, _, _ = await admin.run("sh", "-c", "cat /usr/*/jobworker-canary /*/jobworker-canary")
    assert out == "", "nor does the next job see them"


async def test_what_only_root_may_read_below_programs_is_hidden(
    open_directory: Callable[[], Path],
) -> None:
    directory = open_directory()
    programs = directory / "programs"
    (programs / "open").mkdir(parents=True)
    (programs / "closed").mkdir(mode=0o700)
    for name, mode in {"open/secret": 0o600, "open/public": 0o644, "closed/file": 0o644}.items():
        (programs / name).write_text("canary")
        (programs / name).chmod(mode)
    changes = {"sandbox": {"programs": ["/usr", str(programs)]}}
    async with open_embedded(directory, changes) as service, open_wire(service) as wire:
        script = f"cd {programs}; find . | sort; cat open/public open/secret closed/file"
        out, err, _ = await wire.run("sh", "-c", script)
        assert out == ".\n./open\n./open/public\ncanary"
        assert err.count("No such file") == 2
        # Hidden is hidden: a job that makes such a name anew does not bring back the host's.
        out, _, _ = await wire.run("sh", "-c", f"mkdir {programs}/closed; ls {programs}/closed")
        assert out == ""


async def test_mount_below_programs_is_shown(open_directory: Callable[[], Path]) -> None:
    directory = open_directory()
    inner = directory / "programs" / "inner"
    inner.mkdir(parents=True)
    with mounted("tmpfs", inner):
        (inner / "file").write_text("canary")
        changes = {"sandbox": {"programs": ["/usr", str(directory / "programs")]}}
        async with open_embedded(directory, changes) as service, open_wire(service) as wire:
            out, err, _ = await wire.run("sh", "-c", f"cat {inner}/file; echo x > {inner}/file")
        assert (out, err) == ("canary", "")
        assert (inner / "file").read_text() == "canary"


async def test_what_cannot_be_shown_with_ids_of_the_job_is_refused_at_the_start(
    open_directory: Callable[[], Path],
) -> None:
    directory = open_directory()
    inner = directory / "programs" / "inner"
    inner.mkdir(parents=True)
    changes = {"sandbox": {"programs": ["/usr", str(directory / "programs")]}}
    with mounted("ramfs", inner):
        inner.chmod(0o755)
        with pytest.raises(HostUnsupported, match="ids of their own") as told:
            async with open_embedded(directory, changes):
                pass
    assert str(inner) in str(told.value)
    assert left_behind(directory) == []


async def test_disk_of_a_job_is_gone_with_it(admin: Wire, service: EmbeddedService) -> None:
    def disks() -> int:
        return len(disks_in(service.directory))

    idle = disks()  # the skeleton's, and those of spares
    job = await admin.start("sh", "-c", "head -c 100000000 /dev/zero > x; echo; sleep 60")
    await until(lambda: disks() == idle + 1)
    mounts = Path("/proc/self/mounts").read_text()
    assert str(service.directory) not in mounts
    await admin.call("job.stop", id=job)
    with trio.fail_after(20):
        await until(lambda: disks() == idle)
    assert os.listdir(service.directory / "state" / "scratch") == []


FILL = """
import errno, os, sys
made = 0
try:
    if sys.argv[1] == "bytes":
        with open("big", "wb", buffering=0) as file:
            while True: made += file.write(bytes(1 << 20))
    while True:
        os.mkdir(f"d{made}") if sys.argv[1] == "directories" else os.mknod(f"f{made}")
        made += 1
except OSError as error:
    print(errno.errorcode[error.errno], made)
"""


@pytest.mark.parametrize("what", ["bytes", "inodes"])
async def test_full_disk_ends_inside_the_job_alone(
    open_directory: Callable[[], Path], what: str
) -> None:
    directory = open_directory()
    changes = {"sandbox": {"disk_limit": 32}}
    async with open_embedded(directory, changes) as service, open_wire(service) as wire:
        out, err, _ = await wire.run("python3", "-c", FILL, what)
        word, made = out.split()
        assert word == "ENOSPC", err
        bound = 32 * MIB if what == "bytes" else 32 * MIB // 4096
        assert bound / 4 < int(made) <= bound
        out, _, _ = await wire.run("sh", "-c", "head -c 9000000 /dev/zero > x && echo wrote")
        assert out == "wrote\n", "the next job has a disk of its own"


async def test_job_asks_for_another_disk(admin: Wire) -> None:
    out, err, job = await admin.run("python3", "-c", FILL, "bytes", limits={"disk_bytes": 20 * MIB})
    word, made = out.split()
    assert word == "ENOSPC", err
    assert 10 * MIB < int(made) < 20 * MIB
    limits = job["spec"]["limits"]  # type: ignore[index]
    assert limits["disk_bytes"] == 20 * MIB
    out, _, job = await admin.run(
        "df", "-B1M", "--output=size", "/", limits={"disk_bytes": 3 << 30}
    )
    assert 2900 < int(out.split()[1]) <= 3072


@pytest.mark.parametrize("size", [0, -1, 1000, 15 * MIB, 1 << 60])
async def test_disk_of_an_absurd_size_is_refused_by_name(admin: Wire, size: int) -> None:
    with pytest.raises(Refused, match=r"limits\.disk_bytes"):
        await admin.start("true", limits={"disk_bytes": size})


async def test_disk_that_the_host_has_no_room_for_is_refused(admin: Wire) -> None:
    with pytest.raises(Refused, match=r"mount-disk.*No space left"):
        await admin.start("true", limits={"disk_bytes": 1 << 43})
    assert (await admin.run("true"))[2]["exit_code"] == 0
