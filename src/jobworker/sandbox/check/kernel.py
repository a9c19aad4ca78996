"""Probes of processes, namespaces and confinement, which the process of a job needs.

Each probe makes the call and then checks its effect: a call may succeed and change nothing.

Standard library only.
"""

import contextlib
import errno
import os
import platform
import resource
import socket
import struct
from collections.abc import Iterable
from functools import partial

from jobworker.sandbox import capabilities
from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.check.probing import Missing, Probe, reason_of, run_in_child
from jobworker.sandbox.host_restrictions import user_namespace_remedy
from jobworker.sandbox.start import trampoline
from jobworker.sandbox.user_namespaces import Ids, make_user_namespace

_CLONE_NEWNET = 0x40000000
_GETPRIORITY = {"x86_64": 140, "aarch64": 141}
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_LANDLOCK_SCOPES_ABI = 6


def probes(ids: Ids) -> Iterable[Probe]:
    """The probes of this module; `ids` is a range of user ids that no job uses."""
    yield Probe("processes", "clone3 and pidfd", _clone3, "use Linux 5.4 or newer")
    yield Probe("processes", "close_range", _close_range, "use Linux 5.9 or newer")
    yield Probe(
        "processes", "sealed memory", _sealed_memory, "use a kernel with CONFIG_MEMFD_CREATE"
    )
    yield Probe(
        "processes", "program in memory", _program_in_memory, "set sysctl vm.memfd_noexec to 0 or 1"
    )
    yield Probe("processes", "splice", _splice, "use a kernel without a filter on splice(2)")
    for kind, flag, option in (
        ("mnt", sc.CLONE_NEWNS, "CONFIG_NAMESPACES"),
        ("uts", sc.CLONE_NEWUTS, "CONFIG_UTS_NS"),
        ("ipc", sc.CLONE_NEWIPC, "CONFIG_IPC_NS"),
        ("cgroup", sc.CLONE_NEWCGROUP, "CONFIG_CGROUPS"),
        ("net", _CLONE_NEWNET, "CONFIG_NET_NS"),
    ):
        remedy = f"use a kernel with {option}; in a container, let it make namespaces"
        name = {"mnt": "mount"}.get(kind, kind)
        needed = kind != "net"
        yield Probe("namespaces", f"{name} namespace", partial(_own, kind, flag), remedy, needed)
    yield Probe("namespaces", "pid namespace", _pid_namespace, "use a kernel with CONFIG_PID_NS")
    yield Probe("namespaces", "user namespace", partial(_user_namespace, ids), "")
    yield Probe("confinement", "no_new_privs", _no_new_privs, "use Linux 3.5 or newer")
    yield Probe("confinement", "capabilities", _capabilities, "leave the service CAP_SETPCAP")
    yield Probe(
        "confinement", "system-call filter", _filter, "use a kernel with CONFIG_SECCOMP_FILTER"
    )
    yield Probe("confinement", "session keyring", _keyring, "use a kernel with CONFIG_KEYS")
    yield Probe("confinement", "resource limits", _resource_limits, "raise ulimit -H")
    landlock = "use Linux 6.12 or newer with landlock in the lsm= list of its command line"
    yield Probe("confinement", "landlock scopes", _landlock, landlock, needed=False)


def _clone3() -> str:
    pid, pidfd = sc.clone3(0)
    if pid == 0:
        os._exit(7)
    ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    if ended is None or ended.si_status != 7:
        raise Missing("waitid on a pidfd does not return how the process ended")
    return "clone3, waitid by pidfd"


def _close_range() -> str:
    # A number above all open descriptors, so that the pipe for the probe's answer stays open.
    number = os.dup2(0, 200) if _is_open(0) else os.dup2(os.pipe()[0], 200)
    sc.close_range(number, number)
    if _is_open(number):
        raise Missing("it does not close descriptors")
    return "close_range"


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _sealed_memory() -> str:
    os.close(os.memfd_create("probe", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    return "memfd_create"


def _program_in_memory() -> str:
    program = trampoline.open_program()
    pid, pidfd = sc.clone3(0)
    if pid == 0:
        try:
            sc.close_range(3, program - 1)  # without its descriptors the trampoline exits
            os.execve(program, ["trampoline"], {})  # noqa: S606
        except OSError as error:
            os._exit(error.errno or 1)
    os.close(program)
    ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    os.close(pidfd)
    assert ended is not None
    if ended.si_status != trampoline.NOTHING_TO_DO:
        raise OSError(ended.si_status, os.strerror(ended.si_status))
    return "memfd_create, execveat"


def _splice() -> str:
    read, write = os.pipe()
    os.write(write, b"probe")
    memory = os.memfd_create("probe", os.MFD_CLOEXEC)
    if os.splice(read, memory, 5) != 5 or os.pread(memory, 9, 0) != b"probe":
        raise Missing("it moves less data than asked for")
    return "splice"


def _own(kind: str, flag: int) -> str:
    before = os.readlink(f"/proc/self/ns/{kind}")
    sc.unshare(flag)
    if os.readlink(f"/proc/self/ns/{kind}") == before:
        raise Missing("the call succeeds and changes nothing")
    return "unshare"


def _pid_namespace() -> str:
    first = run_in_child(lambda: str(os.getpid()), sc.CLONE_NEWPID)
    if first != "1":
        raise Missing(f"the first process in it has the process id {first} instead of 1")
    return "clone3"


def _user_namespace(ids: Ids) -> str:
    try:
        id_map = run_in_child(partial(_enter, make_user_namespace(ids.first, ids.each)))
    except Missing as missing:
        raise Missing(missing.reason, user_namespace_remedy()) from None
    except OSError as error:
        raise Missing(reason_of(error), user_namespace_remedy()) from error
    if id_map.split() != ["0", str(ids.first), str(ids.each)]:
        raise Missing(f"its uid_map is {id_map!r}")
    shared = "" if ids.step else ", the same for all jobs"
    return f"setns, {ids.each} ids from {ids.first}{shared}"


def _enter(descriptor: int) -> str:
    sc.setns(descriptor, sc.CLONE_NEWUSER)
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    # Some hosts allow setns(2) but remove all capabilities: make a call that needs one.
    sc.unshare(sc.CLONE_NEWUTS)
    socket.sethostname("probe")
    with open("/proc/self/uid_map", encoding="ascii") as mapped:
        return " ".join(mapped.read().split())


def _status(key: str) -> str:
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        return next(line.split()[1] for line in status if line.startswith(f"{key}:"))


def _no_new_privs() -> str:
    sc.prctl(sc.PR_SET_NO_NEW_PRIVS, 1)
    if _status("NoNewPrivs") != "1":
        raise Missing("the call succeeds and changes nothing")
    return "prctl"


def _capabilities() -> str:
    for number in range(capabilities.LAST + 1):
        try:
            sc.prctl(sc.PR_CAPBSET_DROP, number)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            break
    sc.capset(frozenset())
    if int(_status("CapBnd"), 16) or int(_status("CapEff"), 16):
        raise Missing("some cannot be dropped")
    return "capset, bounding set"


def install_filter(forbidden: int, code: int) -> None:
    """Install a filter that answers the system call number `forbidden` with errno `code`."""
    arch = _AUDIT_ARCH[platform.machine()]
    program = b"".join(
        struct.pack("=HBBI", *instruction)
        for instruction in (
            (0x20, 0, 0, 4),  # load the architecture
            (0x15, 1, 0, arch),
            (0x06, 0, 0, 0x7FFF0000),  # another one: allow
            (0x20, 0, 0, 0),  # load the number
            (0x15, 0, 1, forbidden),
            (0x06, 0, 0, 0x00050000 | code),
            (0x06, 0, 0, 0x7FFF0000),
        )
    )
    sc.prctl(sc.PR_SET_NO_NEW_PRIVS, 1)
    sc.seccomp(program, log=False)


def _filter() -> str:
    install_filter(_GETPRIORITY[platform.machine()], errno.EDOM)
    try:
        os.getpriority(os.PRIO_PROCESS, 0)
    except OSError as error:
        if error.errno == errno.EDOM:
            return "seccomp, BPF program"
    raise Missing("a filter was installed and has no effect")


def _keyring() -> str:
    sc.join_new_session_keyring()
    return "keyctl"


def _resource_limits() -> str:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard < 1024:
        raise Missing(f"the hard limit of open files is {hard}, and jobs need 1024")
    return f"setrlimit, {hard} descriptors"


def _landlock() -> str:
    try:
        abi = sc.landlock_abi()
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            raise Missing("landlock is switched off at boot") from error
        raise
    if abi < _LANDLOCK_SCOPES_ABI:
        raise Missing(f"ABI {abi} has no scopes: jobs can reach the host's abstract sockets")
    with socket.socket(socket.AF_UNIX) as outside, socket.socket(socket.AF_UNIX) as inside:
        outside.bind("")  # an abstract name of the kernel's choice
        outside.listen()
        sc.prctl(sc.PR_SET_NO_NEW_PRIVS, 1)
        parent = os.getppid()
        sc.landlock_restrict_self(sc.landlock_create_scope())
        with contextlib.suppress(PermissionError):
            inside.connect(outside.getsockname())
            raise Missing("an abstract socket outside of the domain can be reached")
        with contextlib.suppress(PermissionError):
            os.kill(parent, 0)
            raise Missing("a process outside of the domain can be signalled")
    return f"ABI {abi}: abstract sockets, signals"
