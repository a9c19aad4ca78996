"""What a job finds that is not its own: descriptors, secrets, and what the last job left."""

import json
import os
import re
import socket
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from jobworker.cli.worker.embedded_service import EmbeddedService

from ...integration.wire import Refused, Wire
from .conftest import Targets

# --- descriptors, CVE-2024-21626 ----------------------------------------------------------------

LIST = (
    "import os, json\nfound = {}\n"
    "for name in os.listdir('/proc/self/fd'):\n"
    "    try: found[name] = os.readlink(f'/proc/self/fd/{name}')\n"
    "    except OSError: pass\n"
    "print(json.dumps(found))\n"
)


async def test_no_descriptor_is_inherited(admin: Wire) -> None:
    out, _, _ = await admin.run("/usr/bin/python3", "-c", LIST)
    found = json.loads(out)
    assert set(found) == {"0", "1", "2"}
    assert found["0"] == "/dev/null"
    assert all(found[number].startswith("pipe:") for number in "12")
    kept = os.open("/", os.O_RDONLY)
    done = subprocess.run(  # noqa: ASYNC221
        ["/usr/bin/python3", "-c", LIST], pass_fds=[kept], capture_output=True, check=True
    )
    os.close(kept)
    assert "/" in json.loads(done.stdout).values(), "the control: else it is"


@pytest.mark.parametrize("way", ["/proc/self/fd/{}", "/proc/1/fd/{}", "/dev/fd/{}"])
async def test_working_directory_through_a_descriptor_is_refused(admin: Wire, way: str) -> None:
    for number in range(3, 20):
        with pytest.raises(Refused, match="change-directory"):
            await admin.run("pwd", workdir=way.format(number))
    with ExitStack() as stack:
        kept = os.open("/", os.O_RDONLY)
        stack.callback(os.close, kept)
        os.stat(
            f"/proc/self/fd/{kept}/usr"
        )  # the control: with a descriptor left open it leads out


# --- secrets ------------------------------------------------------------------------------------

SEARCH = """
import json, os, stat, sys
wanted = [text.encode() for text in json.loads(os.environ["WANTED"])]
found, sockets = set(), []
for top in sys.argv[1:]:
    for path, names, files in os.walk(top):
        if path == "/":
            names[:] = [n for n in names if n not in ("proc", "usr", "sys")]
        for name in files:
            place = os.path.join(path, name)
            try:
                status = os.lstat(place)
                if stat.S_ISSOCK(status.st_mode):
                    sockets.append(place)
                elif stat.S_ISREG(status.st_mode) and status.st_size < 4 << 20:
                    with open(place, "rb") as file:
                        content = file.read()
                    found.update(text.decode() for text in wanted if text in content)
            except OSError:
                pass
for process in filter(str.isdigit, os.listdir("/proc")):
    if process == str(os.getpid()): continue
    try:
        with open(f"/proc/{process}/environ", "rb") as file:
            content = file.read()
        found.update(text.decode() for text in wanted if text in content)
    except OSError:
        pass
print(json.dumps([sorted(found), sockets]))
"""


@pytest.fixture
def secrets(service: EmbeddedService) -> Iterator[tuple[list[str], list[str]]]:
    """Secrets of the host in the usual places, and the directories to find them in."""
    word = f"canary-{uuid.uuid4().hex}"
    with ExitStack() as stack:
        wanted, places = [], []
        for place in ("/run", "/root", "/home", "/opt", "/srv", "/tmp", "/var/lib", "/mnt"):
            directory = Path(place) / word
            directory.mkdir()
            stack.callback(directory.rmdir)
            secret = f"{word}-in-{place.strip('/').replace('/', '-')}"
            (directory / "secret").write_text(secret)
            stack.callback((directory / "secret").unlink)
            wanted.append(secret)
            places.append(str(directory))
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(f"/run/{word}/socket")
        stack.callback(os.unlink, f"/run/{word}/socket")
        process = stack.enter_context(
            subprocess.Popen(["sleep", "1000"], env={"SECRET": f"{word}-in-environment"})
        )
        stack.callback(process.kill)
        wanted.append(f"{word}-in-environment")
        keys = (service.directory / "certs").glob("*key.pem")
        wanted.extend(path.read_text().splitlines()[1] for path in keys)
        places.append(str(service.directory))
        shadow = Path("/etc/shadow").read_text().splitlines()[0]
        wanted.append(shadow)
        wanted.append(str(service.directory / "certs"))  # the service's configuration names it
        wanted.append("SQLite format 3")  # its history
        places.append("/etc")
        yield wanted, places


async def test_secrets_of_the_host_are_nowhere(
    admin: Wire, secrets: tuple[list[str], list[str]]
) -> None:
    wanted, places = secrets
    environment = {"WANTED": json.dumps(wanted)}
    command = ["/usr/bin/python3", "-c", SEARCH]
    done = subprocess.run(  # noqa: ASYNC221
        [*command, *places], env=environment, capture_output=True, check=True, timeout=60
    )
    found, sockets = json.loads(done.stdout)
    assert found == sorted(wanted), "the control: outside all of them are found"
    assert sockets
    out, err, _ = await admin.run(*command, "/", environment=environment)
    found, sockets = json.loads(out)
    assert (found, sockets) == ([], []), err


async def test_no_file_of_the_service_is_mounted(admin: Wire, service: EmbeddedService) -> None:
    out, _, _ = await admin.run("cat", "/proc/self/mountinfo")
    sources = {line.split()[3] for line in out.splitlines()}
    own = [source for source in sources if str(service.directory) in source]
    allowed = re.compile(rf"{service.directory}/state/scratch/job-\S+")
    assert all(allowed.fullmatch(source) for source in own), own


async def test_control_groups_tell_nothing(admin: Wire, targets: Targets) -> None:
    out, _, _ = await admin.run("cat", "/proc/self/cgroup", "/proc/1/cgroup")
    assert {line.split(":", 2)[2] for line in out.splitlines()} == {"/"}
    outside = Path(f"/proc/{targets.processes['neighbour']}/cgroup").read_text()
    assert "/job-" in outside, "the control: the host sees a job's own groups"


# --- left for the next job ----------------------------------------------------------------------

LEFT = f"left-canary-{os.getpid()}"


def for_this_run(source: str) -> str:
    """With names of this run's own: another one may go on beside it."""
    return source.replace("KEY", f"0x4A{os.getpid():06X}").replace("left-canary", LEFT)


MAKE_IPC = for_this_run("""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
key = KEY
print(libc.shmget(key, 4096, 0o1666) >= 0, libc.semget(key, 1, 0o1666) >= 0,
      libc.msgget(key, 0o1666) >= 0, libc.mq_open(b"/left-canary", 0o102, 0o666, None) >= 0)
""")
LEAVE = for_this_run("""
import os
for place in ("/tmp", "/var/tmp", "/dev/shm", "/run", "/root", "/workspace"):
    with open(f"{place}/left-canary", "w") as file: file.write("left")
    os.chmod(f"{place}/left-canary", 0o4777)
libc.syscall(%d, b"user", b"left-canary", b"secret", 6, -3)
libc.syscall(%d, b"user", b"left-canary", b"secret", 6, -4)
""")
LOOK = for_this_run("""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
found = [place for place in ("/tmp", "/var/tmp", "/dev/shm", "/run", "/root", "/workspace")
         if os.path.exists(f"{place}/left-canary")]
key = KEY
if libc.shmget(key, 4096, 0o666) >= 0: found.append("shm")
if libc.semget(key, 1, 0o666) >= 0: found.append("sem")
if libc.msgget(key, 0o666) >= 0: found.append("msg")
if libc.mq_open(b"/left-canary", 0) >= 0: found.append("mq")
for ring in (-3, -4, -5):
    for name in ("left-canary", "host-canary"):
        if libc.syscall(%d, 10, ring, b"user", name.encode(), 0) >= 0:
            found.append(f"{name} {ring}")
print(found)
""")
CLEAN = for_this_run("""
import ctypes
libc = ctypes.CDLL(None)
key = KEY
libc.shmctl(libc.shmget(key, 4096, 0o666), 0, None)
libc.semctl(libc.semget(key, 1, 0o666), 0, 0)
libc.msgctl(libc.msgget(key, 0o666), 0, None)
libc.mq_unlink(b"/left-canary")
""")


def numbers() -> tuple[int, int]:
    """Of add_key(2) and keyctl(2)."""
    return {"x86_64": (248, 250), "aarch64": (217, 219)}[os.uname().machine]


async def test_nothing_is_left_for_the_next_job(admin: Wire) -> None:
    add_key, keyctl = numbers()
    leave, look = MAKE_IPC + LEAVE % (add_key, add_key), LOOK % keyctl
    left, err, _ = await admin.run("python3", "-c", leave)
    assert left == "True True True True\n", err
    for _ in range(4):  # the spares that were made before and after
        out, err, _ = await admin.run("python3", "-c", look)
        assert out == "[]\n", err


async def test_keys_are_not_left_for_the_next_job_even_without_the_filter(
    bare: EmbeddedService,
) -> None:
    from ...integration.wire import open_wire

    add_key, keyctl = numbers()
    leave, look = MAKE_IPC + LEAVE % (add_key, add_key), LOOK % keyctl
    async with open_wire(bare) as wire:
        for _ in range(4):
            out, err, _ = await wire.run("python3", "-c", look + leave + look)
            first, _, last = out.splitlines()
            assert first == "[]", err
            assert f"{LEFT} -3" in last, "the control: within one job the key is found"
            assert f"{LEFT} -4" in last
    done = subprocess.run(  # noqa: ASYNC221
        ["/usr/bin/python3", "-c", look], capture_output=True, text=True, check=True
    )
    assert "host-canary -3" in done.stdout, "the control: outside the session's key is found"


def test_ipc_is_left_outside() -> None:
    """The control: without namespaces the next process finds what the last one left."""
    try:
        for source in (MAKE_IPC, LOOK % numbers()[1]):
            done = subprocess.run(
                ["/usr/bin/python3", "-c", source], capture_output=True, text=True, check=True
            )
        assert all(kind in done.stdout for kind in ("shm", "sem", "msg", "mq")), done.stdout
    finally:
        subprocess.run(["/usr/bin/python3", "-c", CLEAN], check=True)
