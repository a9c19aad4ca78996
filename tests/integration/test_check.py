"""`worker check`: finds what is there, and names what is taken away, each for real.

The probes run in a process to which something was done before: a filter that refuses a system
call, a user namespace that may have no others, a mount namespace without control groups.
"""

import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import jobworker
from jobworker.cli.worker import check_service
from jobworker.cli.worker.embedded_service import program, write_configuration
from jobworker.config.settings import load
from jobworker.pki.administration import init_authority
from jobworker.sandbox.check.main import ProbeSettings, finding_from, format_probe_settings
from jobworker.sandbox.check.probing import Finding

pytestmark = pytest.mark.alone

SOURCE = str(Path(jobworker.__file__).parent.parent)
WANTED = ProbeSettings(("cpu", "memory", "io", "pids"), "", ("/usr",), "/var/tmp", 2_100_000_000, 2)
PREAMBLE = f"""
import encodings.ascii, os, sys, resource; sys.path.insert(0, {SOURCE!r})
from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.check.main import main
from jobworker.sandbox.check.kernel import install_filter
from jobworker.sandbox.user_namespaces import make_user_namespace
def own_mounts():
    sc.unshare(sc.CLONE_NEWNS)
    sc.mount(None, "/", None, sc.MS_REC | sc.MS_PRIVATE)
def enter_a_user_namespace():
    sc.setns(make_user_namespace(0, 4_294_967_295), sc.CLONE_NEWUSER)
def become_an_ordinary_user():
    os.setgroups([]); os.setresgid(54321, 54321, 54321); os.setresuid(54321, 54321, 54321)
    sc.prctl(sc.PR_SET_DUMPABLE, 1)  # as if it had been started as that user
"""
MOUNTED = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
NUMBERS = {
    "memfd_create": (319, 279),
    "splice": (275, 76),
    "unshare": (272, 97),
    "setns": (308, 268),
    "pivot_root": (155, 41),
    "keyctl": (250, 219),
    "mknodat": (259, 33),
    "mount": (165, 40),
    "capset": (126, 91),
    "clone3": (435, 435),
    "close_range": (436, 436),
    "execveat": (322, 281),
    "open_tree": (428, 428),
    "mount_setattr": (442, 442),
    "landlock_create_ruleset": (444, 444),
}


def found(prepare: str = "", probe_settings: ProbeSettings = WANTED) -> dict[str, Finding]:
    """What the probes find after `prepare` was done to their process."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-B", "-c", f"{PREAMBLE}\n{prepare}\nmain()"],
        input=format_probe_settings(probe_settings),
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert done.stderr == ""
    return {each.name: each for each in map(finding_from, done.stdout.splitlines())}


def refuse(call: str, code: int) -> str:
    number = NUMBERS[call][platform.machine() != "x86_64"]
    return f"install_filter({number}, {code})"


def missing(findings: dict[str, Finding]) -> set[str]:
    return {name for name, finding in findings.items() if not finding.supported}


def test_this_host_has_all_that_is_needed_and_nothing_is_left() -> None:
    findings = found()
    assert not [each for each in findings.values() if each.needed and not each.supported]
    assert len(findings) > 30
    deadline = time.monotonic() + 20
    while _left_by_checks() and time.monotonic() < deadline:
        time.sleep(0.1)  # tests that run beside this one check as well
    assert not _left_by_checks()


def _left_by_checks() -> list[str]:
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    left = [line for line in mounts if "jobworker-check-" in line]
    left += [path for path, *_ in os.walk("/sys/fs/cgroup") if "jobworker-check-" in path]
    return left + sorted(_processes())


def _processes() -> set[str]:
    mine = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"jobworker.sandbox.check.main" in (process / "cmdline").read_bytes():
                mine.add(process.name)
        except OSError:
            continue
    return mine


@pytest.mark.parametrize(
    ("call", "code", "names", "reason"),
    [
        ("clone3", 38, {"clone3 and pidfd", "pid namespace"}, "does not have the system call"),
        ("close_range", 38, {"close_range"}, "does not have the system call"),
        ("execveat", 1, {"program in memory"}, "Operation not permitted"),
        ("memfd_create", 38, {"sealed memory"}, "does not have the system call"),
        ("splice", 1, {"splice"}, "Operation not permitted"),
        ("unshare", 1, {f"{n} namespace" for n in ("mount", "uts", "ipc", "net")}, "EPERM"),
        ("unshare", 1, {"user namespace"}, "Operation not permitted"),
        ("setns", 1, {"user namespace"}, "Operation not permitted"),
        ("capset", 1, {"capabilities"}, "Operation not permitted"),
        ("keyctl", 38, {"session keyring"}, "does not have the system call"),
        ("landlock_create_ruleset", 38, {"landlock scopes"}, "does not have the system call"),
        ("landlock_create_ruleset", 95, {"landlock scopes"}, "switched off at boot"),
        ("open_tree", 38, {"open_tree, mount_setattr"}, "does not have the system call"),
        ("mount_setattr", 38, {"mapped owners (ID-mapped mount)"}, "does not have the system call"),
        ("pivot_root", 1, {"pivot_root"}, "Operation not permitted"),
        ("mount", 1, {"tmpfs with a bound", "overlay", "fresh proc"}, "Operation not permitted"),
    ],
)
def test_refused_system_call_is_named(call: str, code: int, names: set[str], reason: str) -> None:
    findings = found(refuse(call, code), WANTED._replace(controllers=()))
    for name in names:
        assert not findings[name].supported, findings[name]
        assert reason in findings[name].detail
        assert findings[name].remedy


def test_host_without_device_nodes_borrows_them() -> None:
    findings = found(refuse("mknodat", 1))
    assert findings["device nodes"].detail == "bind mounts of the host's"


def test_host_that_allows_no_user_namespace_and_the_sysctl_to_change() -> None:
    findings = found(
        "enter_a_user_namespace()\nopen('/proc/sys/user/max_user_namespaces', 'w').write('0')"
    )
    refused = findings["user namespace"]
    assert not refused.supported
    assert "ENOSPC" in refused.detail
    assert "sysctl -w user.max_user_namespaces" in refused.remedy


def test_masked_proc_of_a_container_forbids_a_fresh_one() -> None:
    findings = found(
        "own_mounts()\nsc.mount('tmpfs', '/proc/sys', 'tmpfs', 0)\n"
        "enter_a_user_namespace()\nsc.unshare(sc.CLONE_NEWNS | sc.CLONE_NEWPID)\n"
        "pid = os.fork()\n"
        "if pid: sys.exit(os.waitpid(pid, 0)[1])"
    )
    assert not findings["fresh proc"].supported
    assert "Operation not permitted" in findings["fresh proc"].detail
    assert "container" in findings["fresh proc"].remedy


def test_host_without_control_groups() -> None:
    gone = [point for point in MOUNTED if point.startswith("/sys/fs/cgroup")]
    findings = found(f"own_mounts()\nfor point in {gone[::-1]!r}: sc.umount(point)")
    for controller in WANTED.controllers:
        assert not findings[f"{controller} limit"].supported
        assert f"cannot use the {controller} controller" in findings[f"{controller} limit"].detail
        assert "mount one" in findings[f"{controller} limit"].remedy


def test_one_missing_controller_is_the_only_one_told() -> None:
    point = "/sys/fs/cgroup/pids"
    if point not in MOUNTED:
        pytest.skip("needs cgroup v1 with a pids hierarchy of its own")
    findings = found(f"own_mounts()\nsc.umount({point!r})")
    assert {"pids limit", "all of them together"} < missing(findings)
    assert "its hierarchy is not mounted" in findings["pids limit"].detail
    assert f"mount -t cgroup -o pids cgroup {point}" in findings["pids limit"].remedy
    assert findings["cpu limit"].supported
    without = WANTED._replace(controllers=("cpu", "memory", "io"))
    optional = found(f"own_mounts()\nsc.umount({point!r})", without)
    assert not [each for each in optional.values() if each.needed and not each.supported]


def test_read_only_control_groups() -> None:
    points = [point for point in MOUNTED if point.startswith("/sys/fs/cgroup")]
    findings = found(
        f"own_mounts()\nfor point in {points!r}:\n"
        "    sc.mount(None, point, None, sc.MS_REMOUNT | sc.MS_BIND | sc.MS_RDONLY)"
    )
    assert not findings["memory limit"].supported
    assert "Read-only file system" in findings["memory limit"].detail
    assert "read-write" in findings["memory limit"].remedy


def test_programs_on_a_file_system_without_mapped_owners() -> None:
    findings = found(probe_settings=WANTED._replace(programs=("/sys",)))
    assert {"mapped owners (ID-mapped mount)", "overlay on mapped owners"} <= missing(findings)
    assert "the file system of /sys" in findings["mapped owners (ID-mapped mount)"].detail


def test_host_without_mke2fs_or_loop_devices() -> None:
    findings = found("own_mounts()\nsc.mount('/dev/null', '/usr/sbin/mke2fs', None, sc.MS_BIND)")
    assert "mke2fs" in findings["disk image (mke2fs)"].detail
    assert "install e2fsprogs" in findings["disk image (mke2fs)"].remedy
    findings = found("own_mounts()\nsc.mount('/dev/null', '/dev/loop-control', None, sc.MS_BIND)")
    assert not findings["disk with a bound (loop, ext4)"].supported
    assert "modprobe loop" in findings["disk with a bound (loop, ext4)"].remedy


def test_disks_where_no_files_can_be() -> None:
    refused = found(probe_settings=WANTED._replace(disks="/proc"))["disk image (mke2fs)"]
    assert not refused.supported
    assert "state_dir" in refused.remedy


def test_ordinary_user_has_all_but_limits() -> None:
    findings = found("become_an_ordinary_user()")
    needed = [each for each in findings.values() if each.needed and not each.supported]
    assert {each.group for each in needed} == {"limits"}
    assert findings["device nodes"].detail == "bind mounts of the host's"
    assert "the same for all jobs" in findings["user namespace"].detail
    assert "Permission denied" in findings["memory limit"].detail
    assert "systemd-run --user" in findings["memory limit"].remedy


def test_ordinary_user_that_may_make_no_user_namespace() -> None:
    (refused,) = found(
        "enter_a_user_namespace()\n"
        "open('/proc/sys/user/max_user_namespaces', 'w').write('0')\n"
        "become_an_ordinary_user()"
    ).values()
    assert refused.name == "user namespace"
    assert refused.needed
    assert not refused.supported
    assert "sysctl -w user.max_user_namespaces" in refused.remedy


def test_too_few_descriptors() -> None:
    findings = found("resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))")
    assert "the hard limit of open files is 300" in findings["resource limits"].detail


@pytest.fixture
def site(open_directory: Callable[[], Path]) -> Path:
    """A directory with certificates that hold for some years."""
    directory = open_directory()
    init_authority(directory / "certs", [], now=datetime.now(UTC))
    return directory


def check(
    config: Path, *options: str, within: Sequence[str] = ()
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*within, *program("worker"), "check", "--config", str(config), *options],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def service_findings(config: Path, within: Sequence[str] = ()) -> tuple[int, dict[str, Finding]]:
    done = check(config, "--json", within=within)
    told = json.loads(done.stdout)
    assert told["ok"] == (done.returncode == 0)
    return done.returncode, {row["name"]: Finding(**row) for row in told["findings"]}


def test_command_says_all_is_there_and_leaves_nothing(site: Path) -> None:
    config = write_configuration(site, {})
    done = check(config)
    assert done.returncode == 0, done.stdout
    assert "All that is needed is there" in done.stdout
    assert "Mode: root" in done.stdout
    assert re.search(r"  ok +start, limits, output, end +\d+ ms\n", done.stdout)
    assert re.search(r"  ok +--network=none +\d+ ms\n", done.stdout)
    assert sorted(path.name for path in site.iterdir()) == ["certs", "worker.toml"]
    assert not [path for path, *_ in os.walk("/sys/fs/cgroup") if "jobworker-check-" in path]


def test_host_without_the_program_for_private_networks(site: Path) -> None:
    (site / "bin").mkdir()
    for needed in ("/bin/sh", sys.executable):  # in place of all of /usr/bin
        here = os.path.realpath(needed)
        if here.startswith("/usr/bin/"):
            shutil.copy(here, site / "bin" / Path(here).name)
    if not (site / "bin" / "sh").exists():
        (site / "bin" / "sh").symlink_to(Path(os.path.realpath("/bin/sh")).name)
    hide = f'mount --bind {site}/bin /usr/bin; exec "$@"'
    command = ["unshare", "--mount", "--propagation=private", "sh", "-c", hide, "sh"]
    code, findings = service_findings(write_configuration(site, {}), command)
    assert code == 0
    private = findings["--network=private"]
    assert not private.supported
    assert not private.needed
    assert "slirp4netns" in private.detail
    assert private.remedy


def test_whole_job_fails_where_there_are_no_programs(site: Path) -> None:
    code, findings = service_findings(
        write_configuration(site, {"sandbox": {"programs": ["/nonexistent"]}})
    )
    assert code == 1
    assert not findings["start, limits, output, end"].supported


def test_bad_configuration_is_a_finding(site: Path) -> None:
    code, findings = service_findings(write_configuration(site, {"server": {"port": "x"}}))
    assert code == 1
    assert "server.port" in findings["configuration"].detail


@pytest.mark.parametrize("days", [3, -3])
def test_certificates_that_end_soon_or_have_ended(
    open_directory: Callable[[], Path], days: int
) -> None:
    site = open_directory()
    made = init_authority(site / "certs", [], now=datetime.now(UTC))
    life = made.not_after - datetime.now(UTC)
    for path in made.files:
        Path(path).unlink()
    init_authority(site / "certs", [], now=datetime.now(UTC) - life + timedelta(days=days))
    code, findings = service_findings(write_configuration(site, {}))
    term = findings["end of certificates"]
    assert not term.supported
    assert "renew" in term.remedy
    assert code == (0 if days > 0 else 1)
    assert findings["certificates and key"].supported == (days > 0)


def test_exposed_key_busy_port_open_state_directory_and_bad_profile(site: Path) -> None:
    (site / "bad.toml").write_text("allow = 3")
    (site / "certs" / "server-key.pem").chmod(0o644)
    (site / "state").mkdir()
    (site / "state").chmod(0o777)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        profile = {"seccomp_profile": str(site / "bad.toml")}
        config = write_configuration(site, {"server": {"port": port}, "sandbox": profile})
        code, findings = service_findings(config)
    assert code == 1
    assert "Address already in use" in findings["port"].detail
    assert "chmod 600" in findings["mode of the key"].detail
    assert "bad.toml" in findings["system-call profile"].detail
    assert "others may write" in findings["state directory"].detail
    assert f"chown {os.geteuid()}" in findings["state directory"].remedy


@pytest.mark.parametrize("overcommits", [True, False])
def test_jobs_whose_disks_cannot_all_be_filled(site: Path, overcommits: bool) -> None:
    free = shutil.disk_usage(site).free >> 20
    much = {"disk_limit": free // 3, "overcommit_disk": overcommits}
    config = write_configuration(site, {"worker": {"max_concurrent_jobs": 4}, "sandbox": much})
    room = room_of(config)
    assert (room.supported, room.needed) == (False, False)
    assert "the disks of 4 jobs may take " in room.detail
    assert ("writes are lost is FAILED" in room.detail) == overcommits
    assert ("without room is refused" in room.detail) != overcommits
    assert "sandbox.disk_limit or worker.max_concurrent_jobs" in room.remedy
    assert ("sandbox.overcommit_disk to false" in room.remedy) == overcommits


def test_jobs_whose_disks_can_all_be_filled(site: Path) -> None:
    few = {"worker": {"max_concurrent_jobs": 2, "keep_free": 16}, "sandbox": {"disk_limit": 16}}
    room = room_of(write_configuration(site, few))
    assert room.supported
    assert room.detail.startswith("48.0 MiB at most, ")
    assert room.remedy == ""


def room_of(config: Path) -> Finding:
    (room,) = [
        each for each in check_service.findings(load(config)) if each.name == "room for jobs' disks"
    ]
    return room


def test_state_directory_below_tmp_is_no_gap(tmp_path: Path) -> None:
    """The probes mount over /tmp, among others."""
    probe_settings = WANTED._replace(disks=str(tmp_path))
    assert str(tmp_path).startswith("/tmp/")
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-B", "-c", f"{PREAMBLE}main()"],
        input=format_probe_settings(probe_settings),
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    found = {each.name: each for each in map(finding_from, done.stdout.splitlines())}
    assert found["disk image (mke2fs)"].supported, found
    assert found["disk with a bound (loop, ext4)"].supported, found
