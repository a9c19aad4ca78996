"""One thin function for each Linux system call that the sandbox needs and Python does not have.

This is the launcher's only module with ctypes. Every function raises OSError with the kernel's
errno. The reason for a call stands where it is made. The numbers are those of x86-64 and arm64. On
another machine the import raises ImportError, since the code has never run there.
"""

import ctypes
import os

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.mount.argtypes = [
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_ulong,
    ctypes.c_char_p,
]
_libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4

_NUMBERS = {
    "x86_64": {
        **{"pivot_root": 155, "capset": 126, "keyctl": 250, "rt_sigaction": 13, "seccomp": 317},
        "kcmp": 312,
    },
    "aarch64": {
        **{"pivot_root": 41, "capset": 91, "keyctl": 219, "rt_sigaction": 134, "seccomp": 277},
        "kcmp": 272,
    },
}
_machine = os.uname().machine
if _machine not in _NUMBERS:
    raise ImportError(f"jobworker runs jobs on x86-64 and arm64 kernels, not on {_machine}")
_PIVOT_ROOT = _NUMBERS[_machine]["pivot_root"]
_CAPSET = _NUMBERS[_machine]["capset"]
_KEYCTL = _NUMBERS[_machine]["keyctl"]
_RT_SIGACTION = _NUMBERS[_machine]["rt_sigaction"]
_SECCOMP = _NUMBERS[_machine]["seccomp"]
_KCMP = _NUMBERS[_machine]["kcmp"]
_OPEN_TREE, _MOVE_MOUNT, _CLONE3, _CLOSE_RANGE = 428, 429, 435, 436
_PIDFD_GETFD, _MOUNT_SETATTR = 438, 442
_LANDLOCK_CREATE_RULESET, _LANDLOCK_RESTRICT_SELF = 444, 446

# <linux/if_tun.h>
_TUNGETIFF, _TUNATTACHFILTER = 0x800454D2, 0x401054D5
_IFREQ_BYTES = 40
_SOL_SOCKET, _SO_ATTACH_FILTER = 1, 26

# mount(2)
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_NOATIME, MS_BIND, MS_REC, MS_PRIVATE = 32, 1024, 4096, 16384, 1 << 18
MNT_DETACH = 2
# clone(2), namespaces(7)
CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS = 0x20000, 0x2000000, 0x4000000
CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID = 0x8000000, 0x10000000, 0x20000000
CLONE_NEWNET, CLONE_PARENT = 0x40000000, 0x8000
_CLONE_PIDFD, _CLONE_INTO_CGROUP = 0x1000, 1 << 33
# mount_setattr(2)
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC = 1, 2, 4, 8
_MOUNT_ATTR_IDMAP = 0x100000
# prctl(2)
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_CAPBSET_DROP = 1, 4, 8, 24
PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 38, 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
# kcmp(2)
KCMP_VM, KCMP_FILES = 1, 2

_AT_FDCWD, _AT_EMPTY_PATH, _AT_RECURSIVE = -100, 0x1000, 0x8000
_OPEN_TREE_CLONE = 1
_MOVE_MOUNT_F_EMPTY_PATH, _MOVE_MOUNT_T_EMPTY_PATH = 0x4, 0x40


def _check(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else os.fsencode(text)


def syncfs(descriptor: int) -> None:
    """syncfs(2). Raises OSError if the file system lost a write since `descriptor` was opened."""
    _check(_libc.syncfs(descriptor))


def fallocate(descriptor: int, size: int) -> None:
    """Allocate the blocks of the file's first `size` bytes, and keep its data: fallocate(2).

    Python's posix_fallocate(3) would write zeros if the file system cannot do it.
    """
    _check(_libc.fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size)))


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str = "") -> None:
    """mount(2); `data` has the options of the file system."""
    _check(_libc.mount(_bytes(source), _bytes(target), _bytes(kind), flags, _bytes(data) or None))


def umount(target: str, flags: int = MNT_DETACH) -> None:
    """umount2(2)."""
    _check(_libc.umount2(_bytes(target), flags))


def pivot_root(new: str, old: str) -> None:
    """pivot_root(2)."""
    _check(_libc.syscall(ctypes.c_long(_PIVOT_ROOT), _bytes(new), _bytes(old)))


def unshare(flags: int) -> None:
    """unshare(2)."""
    _check(_libc.unshare(flags))


def setns(descriptor: int, kind: int) -> None:
    """setns(2)."""
    _check(_libc.setns(descriptor, kind))


def prctl(option: int, argument: int = 0, second: int = 0) -> None:
    """prctl(2) with up to two arguments. The others are zero, as most options require."""
    _check(_libc.prctl(option, argument, second, 0, 0))


class _CloneArguments(ctypes.Structure):
    """struct clone_args of clone3(2)."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            "flags",
            "pidfd",
            "child_tid",
            "parent_tid",
            "exit_signal",
            "stack",
            "stack_size",
            "tls",
            "set_tid",
            "set_tid_size",
            "cgroup",
        )
    ]


_SIGCHLD = 17


def clone3(flags: int, cgroup_descriptor: int | None = None) -> tuple[int, int]:
    """clone3(2) used as fork(2): (pid, pidfd) in the parent, (0, -1) in the child.

    `cgroup_descriptor` is a cgroup v2 directory that the child is born in. With `CLONE_PARENT` the
    caller's parent is the child's, and is told of its end as of the caller's. The C library's and
    Python's after-fork steps do not run: only a process of one thread may call this, and the
    child may do little more than system calls and exec.
    """
    pidfd = ctypes.c_int(-1)
    arguments = _CloneArguments(
        flags=flags | _CLONE_PIDFD,
        pidfd=ctypes.addressof(pidfd),
        exit_signal=0 if flags & CLONE_PARENT else _SIGCHLD,
    )
    if cgroup_descriptor is not None:
        arguments.flags |= _CLONE_INTO_CGROUP
        arguments.cgroup = cgroup_descriptor
    size = ctypes.c_size_t(ctypes.sizeof(arguments))
    pid = _check(_libc.syscall(ctypes.c_long(_CLONE3), ctypes.byref(arguments), size))
    return pid, pidfd.value


class _MountAttributes(ctypes.Structure):
    """struct mount_attr of mount_setattr(2)."""

    _fields_ = [(n, ctypes.c_uint64) for n in ("attr_set", "attr_clr", "propagation", "userns_fd")]


def open_tree_clone(path: str, *, recursive: bool = True) -> int:
    """A detached copy of the mount at `path`: open_tree(2); the caller closes it.

    `recursive` copies the mounts below it too.
    """
    flags = ctypes.c_uint(_OPEN_TREE_CLONE | os.O_CLOEXEC | (_AT_RECURSIVE if recursive else 0))
    return _check(
        _libc.syscall(ctypes.c_long(_OPEN_TREE), ctypes.c_int(_AT_FDCWD), _bytes(path), flags)
    )


def mount_setattr(tree: int, attributes: int) -> None:
    """Set `attributes` on the mount `tree` and all below it: mount_setattr(2)."""
    _set_mount_attributes(tree, _MountAttributes(attr_set=attributes), _AT_RECURSIVE)


def map_mount(tree: int, user_namespace: int) -> None:
    """Map the ids of the detached mount `tree` by a user namespace: mount_setattr(2).

    Raises OSError: EINVAL if the file system cannot do it, or the mount is ID-mapped already.
    """
    _set_mount_attributes(
        tree, _MountAttributes(attr_set=_MOUNT_ATTR_IDMAP, userns_fd=user_namespace), 0
    )


def _set_mount_attributes(tree: int, wanted: _MountAttributes, depth: int) -> None:
    flags, size = ctypes.c_uint(_AT_EMPTY_PATH | depth), ctypes.c_size_t(ctypes.sizeof(wanted))
    number = ctypes.c_long(_MOUNT_SETATTR)
    _check(_libc.syscall(number, ctypes.c_int(tree), b"", flags, ctypes.byref(wanted), size))


def move_mount(tree: int, target: str | int) -> None:
    """Attach the detached mount `tree` at `target`, a path or descriptor: move_mount(2)."""
    flags = _MOVE_MOUNT_F_EMPTY_PATH
    at, path = _AT_FDCWD, target
    if isinstance(target, int):
        flags |= _MOVE_MOUNT_T_EMPTY_PATH
        at, path = target, ""
    number = ctypes.c_long(_MOVE_MOUNT)
    where = (ctypes.c_int(at), os.fsencode(str(path)))
    _check(_libc.syscall(number, ctypes.c_int(tree), b"", *where, ctypes.c_uint(flags)))


def close_range(first: int, last: int = 0xFFFFFFFF) -> None:
    """close_range(2): close all descriptors from `first` to `last`."""
    number = ctypes.c_long(_CLOSE_RANGE)
    _check(_libc.syscall(number, ctypes.c_uint(first), ctypes.c_uint(last), ctypes.c_uint(0)))


def set_default_signal(number: int) -> None:
    """Set a signal's disposition to the default: rt_sigaction(2).

    Unlike Python's function it also takes the signals that the C library reserves.
    """
    default = (ctypes.c_uint64 * 4)()  # SIG_DFL, no flags, no restorer, an empty mask
    mask_bytes = ctypes.c_size_t(8)
    call, signal = ctypes.c_long(_RT_SIGACTION), ctypes.c_int(number)
    _check(_libc.syscall(call, signal, ctypes.byref(default), None, mask_bytes))


def join_new_session_keyring() -> None:
    """Leave the inherited session keyring for an anonymous new one: keyctl(2)."""
    join_session_keyring = ctypes.c_int(1)
    _check(_libc.syscall(ctypes.c_long(_KEYCTL), join_session_keyring, None))


def capset(capabilities: frozenset[int]) -> None:
    """Set effective, permitted and inheritable sets of this thread: capset(2), version 3."""
    low = sum(1 << number for number in capabilities if number < 32)
    high = sum(1 << (number - 32) for number in capabilities if number >= 32)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)(low, low, low, high, high, high)
    number = ctypes.c_long(_CAPSET)
    _check(_libc.syscall(number, ctypes.byref(header), ctypes.byref(data)))


class _FilterProgram(ctypes.Structure):
    """struct sock_fprog of <linux/filter.h>."""

    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def seccomp(program: bytes, *, log: bool) -> None:
    """Add a filter to this thread, SECCOMP_SET_MODE_FILTER: seccomp(2).

    `program` is an array of struct sock_filter. With `log` the kernel's audit log has each denial.
    """
    set_mode_filter, flag_log = ctypes.c_uint(1), 2
    packed = _FilterProgram(len(program) // 8, program)
    flags, number = ctypes.c_uint(flag_log if log else 0), ctypes.c_long(_SECCOMP)
    _check(_libc.syscall(number, set_mode_filter, flags, ctypes.byref(packed)))


def pidfd_getfd(process: int, descriptor: int) -> int:
    """A copy of another process's descriptor, which the caller closes: pidfd_getfd(2).

    Raises OSError: EBADF if the process has no such descriptor, EPERM if the caller may not trace
    it.
    """
    number, none = ctypes.c_long(_PIDFD_GETFD), ctypes.c_uint(0)
    return _check(_libc.syscall(number, ctypes.c_int(process), ctypes.c_int(descriptor), none))


def kcmp(thread: int, other: int, kind: int) -> int:
    """Compare the open files (`KCMP_FILES`) or the memory (`KCMP_VM`) of two threads: kcmp(2).

    Returns 0 if they share it; 1 if the first thread's precedes in the kernel's order, else 2.
    """
    threads, none = (ctypes.c_int(thread), ctypes.c_int(other)), ctypes.c_ulong(0)
    return _check(_libc.syscall(ctypes.c_long(_KCMP), *threads, ctypes.c_int(kind), none, none))


def is_tap(descriptor: int) -> bool:
    """Whether the descriptor is attached to a tun or tap device: TUNGETIFF of tuntap.rst."""
    request = ctypes.create_string_buffer(_IFREQ_BYTES)
    return int(_libc.ioctl(descriptor, ctypes.c_ulong(_TUNGETIFF), request)) == 0


def getsockopt(descriptor: int, level: int, option: int, size: int) -> bytes:
    """The value of a socket option, at most `size` bytes: getsockopt(2).

    Python's socket object would call getsockname(2) first, which waits while another process has
    the socket locked.
    """
    value, length = ctypes.create_string_buffer(size), ctypes.c_uint(size)
    _check(_libc.getsockopt(descriptor, level, option, value, ctypes.byref(length)))
    return value.raw[: length.value]


def attach_socket_filter(descriptor: int, program: bytes) -> None:
    """Filter the packets that a socket receives, SO_ATTACH_FILTER: socket(7).

    `program` is an array of struct sock_filter.
    """
    packed = _FilterProgram(len(program) // 8, program)
    size = ctypes.c_uint(ctypes.sizeof(packed))
    _check(_libc.setsockopt(descriptor, _SOL_SOCKET, _SO_ATTACH_FILTER, ctypes.byref(packed), size))


def attach_tap_filter(descriptor: int, program: bytes) -> None:
    """Filter the frames that are read from a tap device's descriptor: TUNATTACHFILTER, tuntap.rst.

    `program` is an array of struct sock_filter, which the kernel copies. It replaces an earlier
    filter.
    """
    packed = _FilterProgram(len(program) // 8, program)
    request = ctypes.c_ulong(_TUNATTACHFILTER)
    _check(_libc.ioctl(descriptor, request, ctypes.byref(packed)))


class _LandlockRuleset(ctypes.Structure):
    """struct landlock_ruleset_attr of <linux/landlock.h>, ABI 6."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("access_fs", "access_net", "scoped")]


def landlock_abi() -> int:
    """The version of Landlock that the kernel has: landlock_create_ruleset(2)."""
    version = ctypes.c_uint(1)
    number = ctypes.c_long(_LANDLOCK_CREATE_RULESET)
    return _check(_libc.syscall(number, None, ctypes.c_size_t(0), version))


def landlock_create_scope() -> int:
    """A ruleset that scopes abstract UNIX sockets and signals; the caller closes it."""
    attributes = _LandlockRuleset(scoped=3)
    size, number = ctypes.c_size_t(ctypes.sizeof(attributes)), _LANDLOCK_CREATE_RULESET
    none = ctypes.c_uint(0)
    return _check(_libc.syscall(ctypes.c_long(number), ctypes.byref(attributes), size, none))


def landlock_restrict_self(ruleset: int) -> None:
    """Enter a new domain of `ruleset`, for good: landlock_restrict_self(2)."""
    number, none = ctypes.c_long(_LANDLOCK_RESTRICT_SELF), ctypes.c_uint(0)
    _check(_libc.syscall(number, ctypes.c_int(ruleset), none))


def file_system_type(path: str) -> int:
    """The type of the file system that holds `path`: f_type of statfs(2)."""
    status = (ctypes.c_long * 32)()  # struct statfs has 15 fields; f_type is the first
    _check(_libc.statfs(os.fsencode(path), ctypes.byref(status)))
    return int(status[0]) & 0xFFFFFFFF
