"""Real tools of abuse and inspection inside a limited job: the host is as it was.

JOBWORKER_SOAK=1 (`make soak`) runs whole classes of stress-ng's stressors.
"""

import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ...integration.wire import Wire

SOAK = bool(os.environ.get("JOBWORKER_SOAK"))
MIB = 1 << 20
CLASSES = ("os", "memory", "vm", "filesystem")
SOME = (
    "clone dentry dev fork fstat get hdd inotify kill link mknod mlock mmap mmapfork msg mq null "
    "personality procfs ptrace rename sem-sysv set shm shm-sysv signal sock splice stack sysinfo "
    "sysinval tmpfs unshare userfaultfd utime vm xattr"
).split()
PASSING = ("random", "ns_last_pid", "stat_refresh", "pty/nr", "usermodehelper", "entropy")


def sysctls() -> Iterator[tuple[str, str]]:
    """What can be set of the kernel, and how it is set; not what changes by itself."""
    for top in ("kernel", "vm", "fs", "net/core", "net/ipv4", "dev"):
        for path in Path("/proc/sys", top).rglob("*"):
            try:
                writable = path.stat().st_mode & stat.S_IWUSR
                if path.is_file() and writable and not any(word in str(path) for word in PASSING):
                    yield str(path), path.read_text()
            except OSError:
                continue


async def harmless(admin: Wire, *command: str, **spec: object) -> str:
    """Run a job and see that the host is as it was: what it printed."""
    before, mounts = dict(sysctls()), len(Path("/proc/self/mountinfo").read_text().splitlines())
    host, limits = os.uname().nodename, {"cpu_percent": 60, "memory_bytes": 256 * MIB}
    out, err, job = await admin.run(*command, limits={**limits, "processes": 200}, **spec)
    assert job["signal"] is None or job["reason"] == "oom", (job, err)
    assert dict(sysctls()) == before
    assert len(before) > 100
    assert os.uname().nodename == host
    assert len(Path("/proc/self/mountinfo").read_text().splitlines()) == mounts
    beside, _, _ = await admin.run("echo", "beside")
    assert beside == "beside\n"
    return out + err


@pytest.fixture
def stress() -> str:
    found = shutil.which("stress-ng", path="/usr/bin")
    if found is None:
        pytest.skip("needs stress-ng (Debian: stress-ng)")
    return found


async def test_stressors_harm_nothing(admin: Wire, stress: str) -> None:
    known = subprocess.run(  # noqa: ASYNC221
        [stress, "--stressors"], capture_output=True, text=True, check=True
    ).stdout.split()
    chosen = [word for name in SOME if name in known for word in (f"--{name}", "1")]
    assert len(chosen) > 40
    said = await harmless(admin, stress, *chosen, "--timeout", "4", "--oomable", "--no-rand-seed")
    assert "completed" in said or "skipped" in said, said[-2000:]


@pytest.mark.skipif(not SOAK, reason="whole classes take many minutes: JOBWORKER_SOAK=1")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", CLASSES)
async def test_classes_of_stressors_harm_nothing(admin: Wire, stress: str, kind: str) -> None:
    await harmless(
        admin,
        *(stress, "--class", kind, "--sequential", "1", "--timeout", "2", "--oomable"),
        timeout_seconds=3000,
    )
