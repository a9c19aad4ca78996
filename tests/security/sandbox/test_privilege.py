"""Privilege: capability sets, setuid programs, the launcher's own program, other entry points."""

import base64
import hashlib
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobworker.cli.worker.embedded_service import EmbeddedService
from jobworker.sandbox import channel
from jobworker.sandbox.protocol.policy import LauncherPolicy
from jobworker.sandbox.seccomp.libseccomp import number_of
from jobworker.sandbox.service.launch import start_launcher
from jobworker.sandbox.start import trampoline
from jobworker.sandbox.start.plan import KEPT_CAPABILITIES

from ...conftest import compiler
from ...integration.test_launcher import Service, make_policy, shown_directory
from ...integration.wire import Wire

__all__ = ["make_policy", "shown_directory"]

KEPT = sum(1 << number for number in KEPT_CAPABILITIES)
DOCKERS = 0xA80425FB
"""The set that Docker gives by default; ours is to be within it."""


def statuses(text: str) -> dict[str, str]:
    """The lines of /proc/PID/status."""
    return dict(re.findall(r"^(\w+):\s+(\S+)", text, re.M))


async def test_capability_sets_are_as_promised(admin: Wire) -> None:
    out, _, _ = await admin.run("cat", "/proc/self/status")
    status = statuses(out)
    for kind in ("CapPrm", "CapEff", "CapBnd", "CapInh"):
        assert int(status[kind], 16) == KEPT, kind
    assert int(status["CapAmb"], 16) == 0
    assert KEPT & ~DOCKERS == 0
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    own = statuses(Path("/proc/self/status").read_text())
    assert int(own["CapEff"], 16) & ~KEPT, "the control: root outside has more"


async def test_signals_session_and_limits_are_as_promised(admin: Wire) -> None:
    script = "import os; print(os.getsid(0)); print(open('/proc/self/limits').read())"
    out, _, _ = await admin.run("cat", "/proc/self/status")
    status = statuses(out)
    assert (status["SigIgn"], status["SigBlk"]) == ("0" * 16, "0" * 16)
    own = statuses(Path(f"/proc/{os.getpid()}/status").read_text())
    assert int(own["SigIgn"], 16), "the control: Python, as the launcher's, ignores some"
    out, _, _ = await admin.run("/usr/bin/python3", "-c", script)
    assert out.splitlines()[0] == "1", "the leader of a session of its own"
    limits = dict(re.findall(r"^Max (\S+(?: \S+)*?) {2,}\S+ +(\S+)", out, re.M))
    assert limits["core file size"] == "0"
    assert limits["msgqueue size"] == "819200"
    assert (limits["nice priority"], limits["realtime priority"]) == ("0", "0")
    assert int(limits["open files"]) <= 65_536
    assert re.search(r"^Max open files +1024 ", out, re.M)
    assert int(limits["locked memory"]) <= 8 << 20


async def test_capabilities_cannot_be_raised_again(admin: Wire) -> None:
    script = (
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "header = (ctypes.c_uint32 * 2)(0x20080522, 0)\n"
        "everything = (ctypes.c_uint32 * 6)(*(0xffffffff,) * 3, *(0x1ff,) * 3)\n"
        "print(libc.capset(header, everything), ctypes.get_errno())\n"
        "print(libc.prctl(47, 2, 21, 0, 0), libc.prctl(24, 0, 0, 0, 0))\n"  # ambient SYS_ADMIN
    )
    out, err, _ = await admin.run("python3", "-c", script)
    assert out == "-1 1\n-1 0\n", err


async def test_capsh_agrees(admin: Wire) -> None:
    if not shutil.which("capsh", path="/usr/sbin:/usr/bin"):
        pytest.skip("needs capsh (Debian: libcap2-bin)")
    out, err, _ = await admin.run("capsh", "--print")
    current = re.search(r"^Current: (.*)$", out, re.M)
    bounding = re.search(r"^Bounding set =(.*)$", out, re.M)
    assert current is not None, err
    assert bounding is not None
    for text in (current[1], bounding[1]):
        for forbidden in "sys_admin sys_module sys_ptrace net_admin net_raw mknod bpf".split():
            assert f"cap_{forbidden}" not in text
        assert "cap_chown" in text


SETUID = """
import os, shutil
shutil.copy("/usr/bin/id", "{place}/id")
os.chown("{place}/id", 0, 0)
os.chmod("{place}/id", 0o6755)
os.setgroups([]); os.setresgid(1000, 1000, 1000); os.setresuid(1000, 1000, 1000)
os.execv("{place}/id", ["id"])
"""


@pytest.mark.parametrize("place", ["/tmp", "/var/tmp", "/dev/shm", "/run", "/workspace", "/root"])
async def test_setuid_program_gains_nothing(admin: Wire, place: str) -> None:
    script = f"import os; os.chmod({place!r}, 0o777)\n" + SETUID.format(place=place)
    out, err, _ = await admin.run("python3", "-c", script)
    assert re.match(r"uid=1000\S* gid=1000\S* ", out), (out, err)
    assert "euid" not in out
    assert "egid" not in out


def test_setuid_program_gains_everything_outside(open_directory: Callable[[], Path]) -> None:
    place = open_directory()
    done = subprocess.run(
        ["/usr/bin/python3", "-c", SETUID.format(place=place)],
        capture_output=True,
        text=True,
        check=False,
    )
    if "euid=0(root)" not in done.stdout and os.statvfs(place).f_flag & os.ST_NOSUID:
        pytest.skip("needs a file system that is not mounted nosuid")
    assert "euid=0(root)" in done.stdout, done.stderr


async def test_setuid_programs_of_the_host_gain_nothing(admin: Wire) -> None:
    if not os.stat("/usr/bin/su").st_mode & 0o4000:
        pytest.skip("needs a setuid program in /usr")
    script = (
        "import os; os.setresuid(1000, 1000, 1000)\n"
        "os.execv('/usr/bin/su', ['su', '-c', 'id', 'root'])\n"
    )
    out, _, job = await admin.run("python3", "-c", script)
    assert "uid=0" not in out
    assert job["exit_code"] != 0


# --- the launcher's own program, CVE-2019-5736 --------------------------------------------------

OVERWRITE = """
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
/* Loaded into a program: keep hold of its file, become another one, then write to it. */
__attribute__((constructor)) static void attack(void) {
    char number[16];
    snprintf(number, sizeof number, "%d", open("/proc/self/exe", O_RDONLY));
    unsetenv("LD_PRELOAD");
    execl("/usr/bin/python3", "python3", "-c",
          "import os, sys\\n"
          "status, code = os.fstat(int(sys.argv[1])), 0\\n"
          "try: os.write(os.open('/proc/self/fd/' + sys.argv[1], os.O_WRONLY), b'overwritten')\\n"
          "except OSError as error: code = error.errno\\n"
          "print(status.st_dev, status.st_ino, code)\\n", number, (char *)0);
}
"""


@pytest.fixture
def overwriter(shown_directory: Path) -> Path:
    """A library that overwrites the program which it is loaded into."""
    source, library = shown_directory / "attack.c", shown_directory / "attack.so"
    source.write_text(OVERWRITE)
    build = [compiler(), "-shared", "-fPIC", "-o", str(library), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    return library


def test_running_program_is_overwritten_outside(overwriter: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    shutil.copy("/usr/bin/true", victim)
    subprocess.run([victim], env={"LD_PRELOAD": str(overwriter)}, check=True, timeout=60)
    assert victim.read_bytes().startswith(b"overwritten")


def test_launchers_program_cannot_be_overwritten(
    make_policy: Callable[..., LauncherPolicy], shown_directory: Path, overwriter: Path
) -> None:
    """A script whose interpreter is /proc/self/exe: execve(2) itself follows that link."""
    own = Path(sys.executable).resolve()
    before = hashlib.sha256(own.read_bytes()).digest()
    script = shown_directory / "script"
    script.write_text("#!/proc/self/exe\n")
    script.chmod(0o755)
    policy = make_policy(programs=("/usr", str(shown_directory)))
    service = Service(start_launcher(policy), policy)
    try:
        environment = {"LD_PRELOAD": str(overwriter)}
        reply, descriptors = service.spawn(1, str(script), environment=environment)
        # What is there is the trampoline: it loads no library and has nothing to go on with.
        assert "ok" in reply, reply
        assert service.exit_of(1)["code"] == trampoline.NOTHING_TO_DO
        assert os.read(descriptors[0], 1000) == b""
        channel.close_all(descriptors)
    finally:
        service.sock.close()
        assert service.leaves() == 0
        assert hashlib.sha256(own.read_bytes()).digest() == before


# --- other entry points -------------------------------------------------------------------------

FOREIGN = """
static long call64(long number, long a, long b, long c) {
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c)
                     : "rcx", "r11", "memory");
    return result;
}
static int call32(int number, int a, int b, int c) {
    int result;
    __asm__ volatile("int $0x80" : "=a"(result) : "a"(number), "b"(a), "c"(b), "d"(c)
                     : "r8", "r9", "r10", "r11", "memory");
    return result;
}
static void say(const char *name, long value) {
    char text[80]; int at = 0, digits = 0; char reversed[24];
    while (*name) text[at++] = *name++;
    text[at++] = ' ';
    if (value < 0) { text[at++] = '-'; value = -value; }
    do { reversed[digits++] = '0' + value % 10; value /= 10; } while (value);
    while (digits) text[at++] = reversed[--digits];
    text[at++] = '\\n';
    call64(1, 1, (long)text, at);
}
void _start(void) {
    say("i386_getpid", call32(20, 0, 0, 0));
    say("i386_unshare_user", call32(310, 0x10000000, 0, 0));
    say("i386_mount", call32(21, 0, 0, 0));
    say("i386_ptrace_me", call32(26, 0, 0, 0));
    say("i386_keyctl", call32(288, 0, -3, 0));
    say("i386_bpf", call32(357, 0, 0, 0));
    say("i386_io_uring_setup", call32(425, 1, 0, 0));
    say("i386_socket_vsock", call32(359, 40, 1, 0));
    say("i386_socket_packet", call32(359, 17, 3, 0));
    say("i386_setns", call32(346, -1, 0, 0));
    say("x32_getpid", call64(0x40000000 | 39, 0, 0, 0));
    say("x32_unshare_user", call64(0x40000000 | 272, 0x10000000, 0, 0));
    say("x32_ptrace", call64(0x40000000 | 521, 0, 0, 0));
    call64(231, 0, 0, 0);
}
"""
ENOSYS = -38


@pytest.fixture(scope="session")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that calls the kernel by the entries of i386 and x32."""
    if os.uname().machine != "x86_64":
        pytest.skip("needs x86-64, which has the entries of i386 and x32")
    place = tmp_path_factory.mktemp("foreign")
    (place / "foreign.c").write_text(FOREIGN)
    build = [compiler(), "-static", "-nostdlib", "-O1", "-fno-stack-protector", "-fno-builtin"]
    subprocess.run(
        [*build, "-o", str(place / "foreign"), str(place / "foreign.c")],
        check=True,
        capture_output=True,
    )
    return place / "foreign"


async def test_entries_of_i386_and_x32_are_closed(admin: Wire, foreign: Path) -> None:
    done = subprocess.run(  # noqa: ASYNC221
        [foreign], capture_output=True, text=True, timeout=30, check=False
    )
    if done.returncode == -11:
        pytest.skip("needs CONFIG_IA32_EMULATION")
    outside = {name: int(value) for name, value in map(str.split, done.stdout.splitlines())}
    assert outside["i386_getpid"] > 0, "the control: outside these calls are made"
    assert outside["i386_unshare_user"] == 0
    assert outside["i386_keyctl"] > 0
    script = (
        "import base64, os, sys\n"
        "with open('/tmp/foreign', 'wb') as file: file.write(base64.b64decode(sys.argv[1]))\n"
        "os.chmod('/tmp/foreign', 0o755)\nos.execv('/tmp/foreign', ['foreign'])\n"
    )
    binary = base64.b64encode(foreign.read_bytes()).decode()
    out, err, _ = await admin.run("python3", "-c", script, binary)
    inside = {name: int(value) for name, value in map(str.split, out.splitlines())}
    assert set(inside) == set(outside), err
    assert set(inside.values()) == {ENOSYS}


# --- what is told of denials --------------------------------------------------------------------


@pytest.fixture
def audit() -> Iterator[socket.socket]:
    """What the kernel's audit tells: audit(8), AUDIT_NLGRP_READLOG."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 9) as listener:
        try:
            listener.bind((0, 1))
        except OSError as error:
            pytest.skip(f"needs CONFIG_AUDIT, and to be in the first namespaces: {error}")
        listener.settimeout(20)
        yield listener


async def test_denied_calls_are_told_to_the_audit_and_the_quiet_ones_are_not(
    admin: Wire, service: EmbeddedService, audit: socket.socket
) -> None:
    if "errno" not in Path("/proc/sys/kernel/seccomp/actions_logged").read_text():
        pytest.skip("needs errno in /proc/sys/kernel/seccomp/actions_logged")
    machine, name = os.uname().machine, f"audit-{os.getpid()}"
    numbers = [number_of(call, machine) for call in ("clone3", "bpf", "acct")]
    script = (
        "import ctypes, sys, threading, os\nlibc = ctypes.CDLL(None)\n"
        f"libc.prctl(15, b'{name}')\n"  # PR_SET_NAME: whose record it is
        "threading.Thread(target=print).start()\n"
        "libc.syscall(1000)\n"
        f"for number in {numbers}: libc.syscall(number, 0, 0, 0)\n"
        "print(open('/proc/self/uid_map').read().split()[1])\n"
    )
    out, err, _ = await admin.run("python3", "-c", script)
    uid = out.split()[-1]
    told: list[int] = []
    while not told or told[-1] != numbers[-1]:
        record = audit.recv(8192)
        kind = struct.unpack_from("=IH", record)[1]
        fields = dict(re.findall(r"(\w+)=(\S+)", record[16:].decode(errors="replace")))
        if kind == 1326 and fields["comm"] == f'"{name}"':  # AUDIT_SECCOMP
            assert fields["uid"] == uid, "by which the job is known"
            told.append(int(fields["syscall"]))
    assert told == numbers[1:], (json.dumps(told), err)
