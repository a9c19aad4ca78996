"""Real tools of abuse and inspection inside a limited job: the host is as it was.

JOBWORKER_SOAK=1 (`make soak`) runs whole classes of stress-ng's stressors.
"""

import os
import shutil
import subprocess
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
SETTINGS = (
    "kernel/core_pattern kernel/hostname kernel/domainname kernel/panic kernel/printk "
    "kernel/randomize_va_space kernel/yama/ptrace_scope vm/overcommit_memory vm/swappiness "
    "vm/panic_on_oom vm/oom_kill_allocating_task fs/protected_symlinks fs/suid_dumpable "
    "net/core/somaxconn net/ipv4/ip_forward net/ipv4/tcp_syncookies"
).split()


def settings() -> dict[str, str]:
    """Settings of the kernel that nothing but an attack would change here."""
    paths = [Path("/proc/sys", name) for name in SETTINGS]
    return {str(path): path.read_text() for path in paths if path.exists()}


async def harmless(
    admin: Wire, *command: str, memory_bytes: int = 256 * MIB, **spec: object
) -> str:
    """Run a job and see that the host is as it was: what it printed."""
    before = settings()
    limits = {"cpu_percent": 60, "memory_bytes": memory_bytes, "processes": 200}
    out, err, job = await admin.run(*command, limits=limits, **spec)
    assert job["signal"] is None or job["reason"] == "oom", (job, err)
    assert settings() == before
    assert len(before) > 8
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
    # Those that grow until they are killed would end the job with them, by design, and too early.
    await harmless(
        admin,
        *(stress, "--class", kind, "--sequential", "1", "--timeout", "2", "--oomable"),
        *("--exclude", "bigheap,brk,env,stack,stackmmap,malloc,resources"),
        memory_bytes=2048 * MIB,
        timeout_seconds=3000,
    )
