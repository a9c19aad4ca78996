"""What a job sees and may do: real jobs, over a real socket, each with the host beside it."""

import contextlib
import ctypes
import os
import re
import subprocess
from pathlib import Path

import pytest

from jobworker.cli.worker.embedded_service import EmbeddedService

from .wire import Refused, Wire


async def test_job_sees_itself_alone_as_pid_1(admin: Wire) -> None:
    out, _, job = await admin.run("ps", "-eo", "pid,args", "--no-headers")
    assert out.split(maxsplit=1)[0] == "1"
    assert out.count("\n") == 1
    assert job["state"] == "COMPLETED"
    assert len(list(Path("/proc").glob("[0-9]*"))) > 3, "the control: the host has more"


async def test_secrets_of_the_host_are_not_there(admin: Wire, service: EmbeddedService) -> None:
    secrets = [
        *("/etc/shadow", "/etc/gshadow", "/etc/ssh", "/etc/ssl/private", "/root/.bashrc"),
        *(str(service.directory), str(service.directory / "certs" / "ca-key.pem")),
        *("/run/systemd", "/run/docker.sock", "/var/tmp", "/proc/1/root/etc/shadow"),
    ]
    for path in filter(os.path.exists, secrets):
        assert os.access(path, os.R_OK), "the control: root on the host reads it"
    script = 'for path in "$@"; do ls -d "$path" 2>/dev/null; done; true'
    out, _, _ = await admin.run("sh", "-c", script, "sh", *secrets)
    assert out == "/var/tmp\n"


@pytest.mark.parametrize("directory", ["/root", "/home", "/run", "/tmp", "/srv", "/mnt", "/media"])
async def test_directories_of_the_host_are_empty_inside(admin: Wire, directory: str) -> None:
    out, err, job = await admin.run("ls", "-A", directory)
    assert (out, err, job["exit_code"]) == ("", "", 0)


async def test_mount_is_refused(admin: Wire) -> None:
    _, err, job = await admin.run("mount", "-t", "tmpfs", "x", "/mnt")
    assert job["exit_code"] not in (0, None)
    assert "permission denied" in err.lower()


async def test_root_inside_is_nobody_outside(admin: Wire) -> None:
    seconds = [f"{number}.{os.getpid()}" for number in (60, 61)]  # no other run says the same
    commands = {f"sleep\0{each}\0".encode() for each in seconds}
    job, other = [await admin.start("sleep", each) for each in seconds]
    try:
        owners = {}
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # others of the host come and go
                command = (process / "cmdline").read_bytes()
                if command in commands:
                    owners[command] = process.stat().st_uid
        assert len(set(owners.values())) == 2, "two live jobs never share a range"
        assert all(uid >= 1_879_048_192 for uid in owners.values())
        out, _, _ = await admin.run("id", "-u")
        assert out == "0\n"
    finally:
        await admin.call("job.stop", id=job)
        await admin.call("job.stop", id=other)


async def test_no_privilege_over_the_host(admin: Wire) -> None:
    out, _, _ = await admin.run("cat", "/proc/self/status", "/proc/self/uid_map")
    assert re.search(r"^NoNewPrivs:\s+1$", out, re.M)
    held = int(re.search(r"^CapBnd:\s+(\w+)$", out, re.M)[1], 16)  # type: ignore[index]
    for forbidden in (12, 13, 16, 17, 19, 21, 22, 23, 24, 25, 27, 38, 39, 40):
        assert not held >> forbidden & 1, f"capability {forbidden} is in the bounding set"
    assert re.search(r"^\s+0\s+\d{10}\s+65536$", out, re.M)


@pytest.mark.parametrize(
    "attempt",
    [
        "echo x > /proc/sys/kernel/core_pattern",
        "echo x > /proc/sysrq-trigger",
        "echo x > /proc/sys/kernel/hostname",
        "mknod /tmp/disk b 254 0",
        "mknod /tmp/null c 1 3",
        "umount /proc/kcore",
        "mount -o remount,rw /",
        "chroot / true && unshare -m mount -t tmpfs x /mnt",
        "date -s 2001-01-01",
        "dmesg",
        "head -c 1 /proc/kcore | grep -q .",
        "grep -q . /proc/kallsyms",
    ],
)
async def test_attempt_on_the_host_fails(admin: Wire, attempt: str) -> None:
    before = Path("/proc/sys/kernel/core_pattern").read_text()
    out, err, job = await admin.run("sh", "-c", attempt)
    assert job["exit_code"] not in (0, None), (out, err)
    assert Path("/proc/sys/kernel/core_pattern").read_text() == before
    assert not Path("/usr/x").exists()


async def test_hostname_is_the_jobs_own(admin: Wire) -> None:
    out, _, job = await admin.run("hostname")
    assert out == f"job-{job['id']}\n"
    assert out.strip() != os.uname().nodename


async def test_nothing_is_inherited(admin: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "ls /proc/self/fd; env; cat /proc/self/cgroup /proc/self/stat; tty"
    out, _, job = await admin.run("bash", "-c", script)
    assert out.startswith("0\n1\n2\n3\n"), "3 is the directory that ls itself reads"
    assert not out.startswith("0\n1\n2\n3\n4\n")
    names = {line.split("=")[0] for line in out.splitlines() if re.match(r"[A-Z_]+=", line)}
    expected = {"PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "JOBWORKER_JOB_ID"}
    assert names <= expected | {"PWD", "OLDPWD", "SHLVL", "_"}
    groups = re.findall(r"^\d+:\S*:(/\S*)$", out, re.M)
    assert groups
    assert set(groups) == {"/"}
    assert "not a tty" in out
    assert job["exit_code"] == 1


@pytest.mark.parametrize("number", range(3, 12))
async def test_working_directory_cannot_be_a_leaked_descriptor(admin: Wire, number: int) -> None:
    with pytest.raises(Refused, match="change-directory"):
        await admin.run("pwd", workdir=f"/proc/self/fd/{number}")


async def test_environment_and_directory_are_as_asked(admin: Wire) -> None:
    out, _, _ = await admin.run(
        "sh",
        "-c",
        'echo "$GREETING|$HOME"; pwd',
        environment={"GREETING": "héllo $x", "HOME": "/tmp"},
        workdir="/var/tmp",
    )
    assert out == "héllo $x|/tmp\n/var/tmp\n"


async def test_default_directory_is_a_private_workspace(admin: Wire) -> None:
    out, _, _ = await admin.run("sh", "-c", "pwd; touch left && ls; ls -ld . | cut -d' ' -f3")
    assert out == "/workspace\nleft\nroot\n"
    out, _, _ = await admin.run("ls", "-A", "/workspace", "/tmp", "/dev/shm")
    assert "left" not in out


async def test_jobs_do_not_use_up_what_the_hosts_root_may_have(admin: Wire) -> None:
    take = (
        "import ctypes, time\nlibc = ctypes.CDLL(None)\ncount = 0\n"
        "while libc.inotify_init1(0) >= 0: count += 1\n"
        "print(count, flush=True)\ntime.sleep(60)\n"
    )
    result = await admin.call("job.run", job={"command": ["python3", "-c", take]}, follow={})
    job = result["job"]
    assert isinstance(job, dict)
    await admin.notes(result["subscription"]).receive()
    libc = ctypes.CDLL(None, use_errno=True)
    mine = libc.inotify_init1(0)
    assert mine >= 0, os.strerror(ctypes.get_errno())
    os.close(mine)
    await admin.call("job.stop", id=job["id"])


async def test_keyrings_are_out_of_reach(admin: Wire) -> None:
    script = (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "for number in (248, 249, 250):\n"
        "    libc.syscall(number, b'user', b'canary', b'secret', 6, -4)\n"
        "    print(ctypes.get_errno(), end=' ')\n"
    )
    if os.uname().machine != "x86_64":
        pytest.skip("the numbers of add_key(2), request_key(2) and keyctl(2) are those of x86-64")
    out, err, _ = await admin.run("python3", "-c", script)
    assert out == "1 1 1 ", err


async def test_launchers_own_program_cannot_be_run(admin: Wire) -> None:
    # These are the trampoline, which has nothing to go on with and cannot be written to.
    for path in ("/proc/self/exe", "/proc/1/exe"):
        out, err, job = await admin.run(path)
        assert (job["state"], job["exit_code"], out, err) == ("FAILED", 127, "", "")


async def test_job_cannot_signal_the_host(admin: Wire) -> None:
    with subprocess.Popen(["sleep", "60"]) as canary:  # noqa: ASYNC220 - returns at once
        out, err, job = await admin.run("kill", "-9", str(canary.pid))
        assert job["exit_code"] == 1, (out, err)
        assert canary.poll() is None
        canary.kill()
