"""A binding of the functions of libseccomp that the filter needs: names, rules, BPF programs.

libseccomp knows the number of each system call on each machine, and exports a program that finds
a call by a binary tree. Only the service loads the library, once at its start; the launcher gets
the finished program. So this module uses ctypes itself: `sandbox.syscalls` is loaded by the
launcher. See seccomp_init(3), seccomp_rule_add(3), seccomp_attr_set(3), seccomp_export_bpf(3).
"""

import ctypes
import os
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from jobworker.errors import HostUnsupported

ALLOW = 0x7FFF0000
_DEFAULT_ACTION, _BAD_ARCH_ACTION, _NO_NEW_PRIVILEGES, _OPTIMIZE = 1, 2, 3, 8
_MASKED_EQUAL = 7
_BINARY_TREE = 2
_UNKNOWN = -1
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""AUDIT_ARCH_… of <linux/audit.h>, by the machine's name from uname(2)."""


def error(number: int) -> int:
    """The action that makes a call fail with this errno."""
    return 0x00050000 | number


class SystemCall(NamedTuple):
    """A system call: its name, and its number on the machine that the filter is for."""

    name: str
    number: int


class Comparison(NamedTuple):
    """A condition on the argument with this index, 0 to 5: `argument & mask == value`."""

    argument: int
    mask: int
    value: int


class _Comparison(ctypes.Structure):
    """struct scmp_arg_cmp."""

    _fields_ = [
        ("argument", ctypes.c_uint),
        ("operation", ctypes.c_int),
        ("mask", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
    ]


@cache
def _load() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError as fault:
        raise HostUnsupported(
            f"cannot make the system-call filter: {fault}",
            remedy="install libseccomp (Debian: libseccomp2)",
        ) from None
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_init.argtypes = [ctypes.c_uint32]
    library.seccomp_release.argtypes = [ctypes.c_void_p]
    library.seccomp_release.restype = None
    library.seccomp_arch_add.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
    library.seccomp_arch_remove.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
    library.seccomp_attr_set.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32]
    library.seccomp_syscall_resolve_name.argtypes = [ctypes.c_char_p]
    library.seccomp_syscall_resolve_name_arch.argtypes = [ctypes.c_uint32, ctypes.c_char_p]
    library.seccomp_export_bpf.argtypes = [ctypes.c_void_p, ctypes.c_int]
    library.seccomp_rule_add_array.argtypes = [
        *(ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint),
        ctypes.POINTER(_Comparison),
    ]
    return library


def number_of(call: str, machine: str) -> int | None:
    """The number of a system call on `machine`, or None if that machine does not have the call.

    Raises KeyError if libseccomp knows the call on no machine.
    """
    resolve = _load().seccomp_syscall_resolve_name_arch
    number = int(resolve(ARCHITECTURES[machine], call.encode()))
    if number == _UNKNOWN:
        raise KeyError(call)
    return None if number < 0 else number


class FilterBuilder:
    """A filter under construction for one machine: scmp_filter_ctx, released on exit.

    The actions `default` and `bad_architecture` answer calls that no rule names, and calls of
    another ABI. Raises HostUnsupported if libseccomp reports an error.
    """

    def __init__(self, default: int, bad_architecture: int, machine: str) -> None:
        self._library = _load()
        self._native = machine == os.uname().machine
        self._handle = self._library.seccomp_init(default)
        if not self._handle:
            raise HostUnsupported("cannot make the system-call filter: libseccomp has no memory")
        if not self._native:
            self._check(self._library.seccomp_arch_add(self._handle, ARCHITECTURES[machine]))
            self._check(self._library.seccomp_arch_remove(self._handle, 0))
        for attribute, value in (
            (_BAD_ARCH_ACTION, bad_architecture),
            (_NO_NEW_PRIVILEGES, 0),
            (_OPTIMIZE, _BINARY_TREE),
        ):
            self._check(self._library.seccomp_attr_set(self._handle, attribute, value))

    def __enter__(self) -> "FilterBuilder":
        return self

    def __exit__(self, *_: object) -> None:
        self._library.seccomp_release(self._handle)

    def add(self, action: int, call: SystemCall, comparisons: Sequence[Comparison]) -> None:
        """Add a rule: `action` answers `call` where every one of `comparisons` is true."""
        array = (_Comparison * len(comparisons))(
            *(_Comparison(c.argument, _MASKED_EQUAL, c.mask, c.value) for c in comparisons)
        )
        number = call.number
        if not self._native:
            # libseccomp takes the numbers of the machine that compiles and translates them. Only
            # tests compile for another machine; calls that it cannot translate are left out.
            number = self._library.seccomp_syscall_resolve_name(call.name.encode())
            if number == _UNKNOWN:
                return
        add = self._library.seccomp_rule_add_array
        self._check(add(self._handle, action, number, len(comparisons), array))

    def program(self) -> bytes:
        """The finished BPF program: an array of struct sock_filter of <linux/filter.h>."""
        memory = os.memfd_create("filter", os.MFD_CLOEXEC)
        try:
            self._check(self._library.seccomp_export_bpf(self._handle, memory))
            os.lseek(memory, 0, os.SEEK_SET)
            with os.fdopen(os.dup(memory), "rb") as file:
                return file.read()
        finally:
            os.close(memory)

    def _check(self, result: int) -> None:
        if result < 0:
            raise HostUnsupported(
                f"cannot make the system-call filter: libseccomp says {os.strerror(-result)}",
                remedy="use libseccomp 2.5 or newer",
            )
