"""Attempts on files, mounts and /proc: cases 3, 4, 6, 7 and 13 of the threat model."""

from __future__ import annotations

import ctypes
import os
import resource
import stat
import tempfile

from .attempt import (
    GIVEN,
    NEWNS,
    attempt,
    call,
    check,
    libc,
    open_uncovered,
)

MS_REMOUNT, MS_BIND = 32, 4096
DETACH = 2


def directory() -> str:
    """A directory to do harm in, private to the attempt."""
    return tempfile.mkdtemp(dir="/tmp")


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str = "") -> None:
    """mount(2)."""
    words = (None if word is None else word.encode() for word in (source, target, kind))
    first, second, third = words
    check(libc.mount(first, second, third, ctypes.c_ulong(flags), data.encode() or None))


# --- what belongs to the kernel -----------------------------------------------------------------


@attempt
def write_core_pattern() -> None:
    with open("/proc/sys/kernel/core_pattern", "r+") as file:
        same = file.read()
        file.seek(0)
        file.write(same)


@attempt
def open_sysrq_trigger() -> None:
    open_uncovered("/proc/sysrq-trigger", os.O_WRONLY)


@attempt
def write_vm_sysctl() -> None:
    open_uncovered("/proc/sys/vm/drop_caches", os.O_WRONLY)


@attempt
def write_other_sysctls() -> object:
    return writable_below("/proc/sys") or refused()


@attempt
def write_elsewhere_in_proc() -> object:
    """Every file of /proc, those of processes and of /proc/sys aside."""
    found: list[str] = []
    for name in sorted(os.listdir("/proc")):
        if not name.isdigit() and name not in ("sys", "self", "thread-self"):
            found.extend(writable_below(f"/proc/{name}"))
    return found or refused()


@attempt
def write_sysfs() -> object:
    return writable_below("/sys/kernel") or refused()


def writable_below(top: str) -> list[str]:
    """The files at and below `top` that can be opened for writing."""
    found = []
    paths = [top] if not os.path.isdir(top) else []
    for path, _, names in os.walk(top):
        paths.extend(f"{path}/{name}" for name in names)
    for path in paths:
        if os.path.islink(path):
            continue
        try:
            os.close(open_uncovered(path, os.O_WRONLY))
        except Exception:  # noqa: BLE001 - it cannot be written to
            continue
        found.append(path)
    return found


def refused() -> list[str]:
    """Where nothing is found, the attempt has failed."""
    raise PermissionError(1, "nothing can be written to")


@attempt
def read_kcore() -> None:
    os.read(open_uncovered("/proc/kcore", os.O_RDONLY), 64)


@attempt
def read_kallsyms() -> None:
    if not os.read(open_uncovered("/proc/kallsyms", os.O_RDONLY), 64):
        raise OSError(2, "empty")


@attempt
def read_kmsg() -> None:
    os.close(open_uncovered("/proc/kmsg", os.O_RDONLY))


@attempt
def read_dev_kmsg() -> None:
    os.close(os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK))


@attempt
def read_kernel_log() -> None:
    call("syslog", 10, 0, 0)


@attempt
def read_keys_of_others() -> None:
    if not os.read(open_uncovered("/proc/key-users", os.O_RDONLY), 64):
        raise OSError(2, "empty")


@attempt
def read_kernel_configuration() -> None:
    os.read(open_uncovered("/proc/config.gz", os.O_RDONLY), 64)


@attempt
def read_how_the_host_was_started() -> None:
    os.read(open_uncovered("/proc/cmdline", os.O_RDONLY), 64)


@attempt
def read_what_others_write_to_disks() -> None:
    os.read(open_uncovered("/proc/diskstats", os.O_RDONLY), 64)


@attempt
def list_the_disks_of_others() -> object:
    return any(os.listdir(f"/proc/fs/{kind}") for kind in os.listdir("/proc/fs")) or refused()


# --- out of the root ----------------------------------------------------------------------------


def see_canary() -> None:
    """Reach the host's canary."""
    with open(GIVEN["canary"]) as file:
        assert file.read() == "canary\n"


@attempt
def read_canary_by_its_path() -> None:
    see_canary()


@attempt
def read_canary_by_dots() -> None:
    with open("/.." * 40 + GIVEN["canary"]) as file:
        assert file.read() == "canary\n"


@attempt
def read_canary_through_proc_root() -> None:
    for process in ("1", "self", *map(str, GIVEN["pids"].values())):
        try:
            with open(f"/proc/{process}/root{GIVEN['canary']}") as file:
                assert file.read() == "canary\n"
        except OSError:
            continue
        return
    raise FileNotFoundError(2, "no process has it in its root")


@attempt
def chroot_twice() -> None:
    inner = directory()
    top = os.open("/", os.O_RDONLY)
    os.chroot(inner)
    os.fchdir(top)
    for _ in range(200):
        os.chdir("..")
    os.chroot(".")
    see_canary()


@attempt
def fchdir_through_every_descriptor() -> None:
    if os.environ.get("OUTSIDE"):
        kept = os.open(os.path.dirname(GIVEN["canary"]), os.O_RDONLY)
        os.chroot(directory())
        os.set_inheritable(kept, True)
    for number in range(3, 256):
        try:
            os.fchdir(number)
            with open(os.path.basename(GIVEN["canary"])) as file:
                assert file.read() == "canary\n"
        except OSError:
            continue
        return
    raise FileNotFoundError(2, "no descriptor leads there")


@attempt
def pivot_to_a_new_root() -> None:
    new = directory()
    mount("tmpfs", new, "tmpfs", 0)
    os.chdir(new)
    call("pivot_root", b".", b".")


@attempt
def open_by_handle() -> None:
    handle = (ctypes.c_uint32 * 40)(128)
    mount_id = ctypes.c_int()
    path = os.open(GIVEN["handle_of"], os.O_RDONLY)
    name = ctypes.c_char_p(GIVEN["handle_of"].encode())
    at = -100 & (1 << 64) - 1
    if os.environ.get("OUTSIDE") or "name_to_handle_at" in GIVEN["numbers"]:
        call("name_to_handle_at", at, name, ctypes.byref(handle), ctypes.byref(mount_id), 0)
    call("open_by_handle_at", path, ctypes.byref(handle), 0)


# --- mounts and devices -------------------------------------------------------------------------


@attempt
def mount_a_tmpfs() -> None:
    mount("tmpfs", directory(), "tmpfs", 0)


@attempt
def mount_proc_without_masks() -> None:
    mount("proc", directory(), "proc", 0)


@attempt
def mount_a_bind() -> None:
    mount("/", directory(), None, MS_BIND)


@attempt
def mount_by_the_new_calls() -> None:
    call("fsopen", b"tmpfs", 0)


@attempt
def clone_a_tree() -> None:
    call("open_tree", -100, b"/", 1)


@attempt
def remount_root_writable() -> None:
    mount(None, "/", None, MS_REMOUNT | MS_BIND)


@attempt
def unmount_a_mask() -> None:
    if os.environ.get("OUTSIDE"):
        mount("/dev/null", "/proc/keys", None, MS_BIND)
    check(libc.umount2(b"/proc/keys", DETACH))


@attempt
def unmount_proc_sys() -> None:
    if os.environ.get("OUTSIDE"):
        mount("/proc/sys", "/proc/sys", None, MS_BIND)
    check(libc.umount2(b"/proc/sys", DETACH))


@attempt
def make_a_disk() -> None:
    os.mknod(f"{directory()}/disk", stat.S_IFBLK | 0o600, os.makedev(254, 0))


@attempt
def make_a_character_device() -> None:
    os.mknod(f"{directory()}/mem", stat.S_IFCHR | 0o600, os.makedev(1, 1))


@attempt
def own_mount_namespace() -> None:
    call("unshare", NEWNS)


# --- control groups and limits ------------------------------------------------------------------


@attempt
def mount_control_groups() -> None:
    mount("none", directory(), "cgroup2", 0)


@attempt
def mount_control_groups_of_version_1() -> None:
    """The way of CVE-2022-0492: a hierarchy whose release_agent the kernel runs as root."""
    place = directory()
    mount("none", place, "cgroup", 0, "none,name=jobworker-attempt")
    try:
        with open(f"{place}/release_agent", "r+") as file:
            file.read()
    finally:
        check(libc.umount2(place.encode(), 0))


@attempt
def see_control_groups() -> None:
    if not os.listdir("/sys/fs/cgroup"):
        raise FileNotFoundError(2, "empty")


def raise_limit(kind: int) -> None:
    """Have a limit lowered, and take that back."""
    _, hard = resource.getrlimit(kind)
    if os.environ.get("OUTSIDE"):
        resource.setrlimit(kind, (0, 10))
    try:
        wanted = hard if os.environ.get("OUTSIDE") else resource.RLIM_INFINITY
        resource.setrlimit(kind, (wanted, wanted))
    except ValueError:  # Python's word for EPERM here
        raise PermissionError(1, "not allowed to raise it") from None


@attempt
def raise_core_limit() -> None:
    raise_limit(resource.RLIMIT_CORE)


@attempt
def raise_file_limit() -> None:
    raise_limit(resource.RLIMIT_NOFILE)


@attempt
def raise_locked_memory_limit() -> None:
    raise_limit(resource.RLIMIT_MEMLOCK)


@attempt
def raise_priority() -> None:
    os.setpriority(os.PRIO_PROCESS, 0, -10)


@attempt
def become_real_time() -> None:
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))


@attempt
def evade_the_oom_killer() -> None:
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("-1000")
