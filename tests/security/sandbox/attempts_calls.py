"""Attempts by system calls: cases 12, 14, 15, 16 and 18 of the threat model."""

from __future__ import annotations

import ctypes
import fcntl
import os
import pty
import socket
import struct
import termios
from contextlib import suppress

from .attempt import (
    GIVEN,
    NEWCGROUP,
    NEWIPC,
    NEWNET,
    NEWNS,
    NEWPID,
    NEWTIME,
    NEWUSER,
    NEWUTS,
    attempt,
    call,
    check,
    libc,
)

SIGCHLD = 17

# --- namespaces ---------------------------------------------------------------------------------


@attempt
def unshare_user_namespace() -> None:
    call("unshare", NEWUSER)


@attempt
def unshare_user_namespace_beside_harmless_flags() -> None:
    call("unshare", NEWUSER | 0x200 | 0x400)


@attempt
def unshare_time_namespace() -> None:
    call("unshare", NEWTIME)


@attempt
def clone_user_namespace() -> None:
    clone(NEWUSER)


@attempt
def clone_user_namespace_with_high_bits() -> None:
    clone(NEWUSER | 1 << 40)


def clone(flags: int) -> None:
    """clone(2) as fork(2); the child ends at once."""
    if call("clone", flags | SIGCHLD, 0, 0, 0, 0) == 0:
        os._exit(0)
    os.wait()


@attempt
def clone3_user_namespace() -> None:
    arguments = (ctypes.c_uint64 * 8)(NEWUSER, 0, 0, 0, SIGCHLD)
    if call("clone3", ctypes.byref(arguments), 64) == 0:
        os._exit(0)
    os.wait()


@attempt
def enter_other_namespaces() -> object:
    """setns(2) into whatever namespace can be reached."""
    entered = []
    for process in ("1", "self", *map(str, GIVEN["pids"].values())):
        for kind in ("mnt", "uts", "ipc", "net", "cgroup", "pid"):
            try:
                descriptor = os.open(f"/proc/{process}/ns/{kind}", os.O_RDONLY)
                check(libc.setns(descriptor, 0))
            except OSError:
                continue
            entered.append(f"{process}/{kind}")
    if not entered:
        raise PermissionError(1, "none could be entered")
    return True


def _unshare_each() -> None:
    for name, flag in (
        ("uts", NEWUTS),
        ("ipc", NEWIPC),
        ("mnt", NEWNS),
        ("net", NEWNET),
        ("pid", NEWPID),
        ("cgroup", NEWCGROUP),
    ):

        def try_it(flag: int = flag) -> None:
            call("unshare", flag)

        try_it.__name__ = f"unshare_{name}_namespace"
        attempt(try_it)


_unshare_each()


# --- other processes ----------------------------------------------------------------------------


def _attack_each() -> None:
    for whom in ("canary", "service", "launcher", "neighbour"):

        def signal_it(whom: str = whom) -> None:
            os.kill(GIVEN["pids"][whom], 0)

        def trace_it(whom: str = whom) -> None:
            pid = GIVEN["pids"][whom]
            check(libc.ptrace(16, pid, None, None))  # PTRACE_ATTACH
            os.waitpid(pid, 0)
            check(libc.ptrace(17, pid, None, None))  # PTRACE_DETACH

        def read_its_memory(whom: str = whom) -> None:
            pid = GIVEN["pids"][whom]
            with open(f"/proc/{pid}/maps") as maps:
                start = int(maps.readline().split("-")[0], 16)
            peek(pid, start, "process_vm_readv")

        def write_its_memory(whom: str = whom) -> None:
            peek(
                GIVEN["pids"][whom], 8, "process_vm_writev"
            )  # an address that is no one's: nothing is changed

        def take_its_descriptor(whom: str = whom) -> None:
            call("pidfd_getfd", os.pidfd_open(GIVEN["pids"][whom]), 0, 0)

        def read_its_environment(whom: str = whom) -> None:
            with open(f"/proc/{GIVEN['pids'][whom]}/environ", "rb") as file:
                file.read(1)

        for function in (
            *(signal_it, trace_it, read_its_memory, write_its_memory, take_its_descriptor),
            read_its_environment,
        ):
            function.__name__ = f"{function.__name__}_{whom}"
            attempt(function)


def peek(pid: int, address: int, name: str) -> None:
    """process_vm_readv(2) or process_vm_writev(2) of eight bytes."""
    mine = ctypes.create_string_buffer(8)
    local = (ctypes.c_uint64 * 2)(ctypes.addressof(mine), 8)
    remote = (ctypes.c_uint64 * 2)(address, 8)
    call(name, pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)


_attack_each()


@attempt
def have_a_signal_sent_by_the_kernel() -> None:
    """SIGIO to a process of the host, by being its socket's owner."""
    mine, _ = socket.socketpair()
    fcntl.fcntl(mine, fcntl.F_SETOWN, GIVEN["pids"]["canary"])


# --- calls that no job needs --------------------------------------------------------------------

NOTHING = (0, 0, 0, 0, 0, 0)
RAW: dict[str, tuple[object, ...]] = {
    "bpf": NOTHING,
    "perf_event_open": NOTHING,
    "userfaultfd": (1,),
    "memfd_secret": (0,),
    "io_uring_setup": NOTHING,
    "io_uring_enter": (-1, *NOTHING[1:]),
    "io_uring_register": (-1, *NOTHING[1:]),
    "keyctl": (0, -3, 0),
    "add_key": NOTHING,
    "request_key": NOTHING,
    "kexec_load": (0, 0, 0, 0xFFFF),
    "kexec_file_load": (-1, -1, 0, 0, 0xFFFF),
    "init_module": NOTHING,
    "finit_module": (-1, b"", 0),
    "delete_module": (b"no_such_module", 0),
    "swapon": (b"/nosuch", 0),
    "swapoff": (b"/nosuch",),
    "reboot": NOTHING,
    "settimeofday": (1, 0),
    "clock_settime": (0, 1),
    "sethostname": (b"", -1),
    "setdomainname": (b"", -1),
    "acct": (b"/nosuch",),
    "quotactl": NOTHING,
    "iopl": (0,),
    "ioperm": (0, 0, 0),
    "modify_ldt": (0, 0, 0),
    "kcmp": (0, 0, 7, 0, 0),
    "process_madvise": (-1, 0, 0, 0, 0),
    "pidfd_getfd": (-1, 0, 0),
    "fanotify_init": (0, 0),
    "get_mempolicy": NOTHING,
    "move_pages": NOTHING,
    "mbind": NOTHING,
    "set_mempolicy": (0, 0, 0),
    "migrate_pages": (0, 0, 0, 0),
    "personality": (0x0400000,),
    "vhangup": (),
    "mount_setattr": (-1, b"", 0, 0, 0),
    "move_mount": (-1, b"", -1, b"", 0),
    "fsconfig": (-1, 0, 0, 0, 0),
    "fsmount": (-1, 0, 0),
    "fspick": (-1, b"", 0),
}


def _call_each() -> None:
    for name, arguments in RAW.items():

        def try_it(name: str = name, arguments: tuple[object, ...] = arguments) -> None:
            call(name, *arguments)

        try_it.__name__ = f"call_{name}"
        attempt(try_it)


_call_each()


@attempt
def call_the_next_number_to_come() -> None:
    check(libc.syscall(ctypes.c_long(GIVEN["newest_call"] + 1), 0, 0, 0, 0, 0, 0))


# --- sockets ------------------------------------------------------------------------------------


def _open_each() -> None:
    for name, family, kind, protocol in (
        ("alg", 38, socket.SOCK_SEQPACKET, 0),
        ("vsock", 40, socket.SOCK_STREAM, 0),
        ("packet", 17, socket.SOCK_RAW, 0x0300),
        ("packet_datagram", 17, socket.SOCK_DGRAM, 0x0300),
        ("vsock_with_high_bits", 40 | 1 << 32, socket.SOCK_STREAM, 0),
        ("raw_ip", 2, socket.SOCK_RAW, 255),
        ("netlink_audit", 16, socket.SOCK_RAW, 9),
        ("netlink_netfilter", 16, socket.SOCK_RAW, 12),
        ("netlink_uevent", 16, socket.SOCK_RAW, 15),
        ("xdp", 44, socket.SOCK_RAW, 0),
        ("multipath_tcp", 2, socket.SOCK_STREAM, 262),
        ("multipath_tcp_with_high_bits", 10, socket.SOCK_STREAM, 262 | 1 << 32),
        ("sctp", 2, socket.SOCK_STREAM, 132),
        ("dccp", 2, 6, 33),
        ("sctp_by_its_kind", 2, socket.SOCK_SEQPACKET, 0),
        ("dccp_by_its_kind", 10, 6 | socket.SOCK_CLOEXEC, 0),
        ("smc", 2, socket.SOCK_STREAM, 256),
        ("l2tp", 2, socket.SOCK_DGRAM, 115),
        ("udp_lite", 2, socket.SOCK_DGRAM, 136),
    ):

        def try_it(family: int = family, kind: int = kind, protocol: int = protocol) -> None:
            call("socket", family, kind, protocol)

        try_it.__name__ = f"open_socket_{name}"
        attempt(try_it)


_open_each()


@attempt
def take_other_code_above_tcp() -> None:
    """TCP_ULP of linux/tcp.h: where the kernel looks for the name, it would find a real one."""
    with socket.socket() as mine, suppress(FileNotFoundError):
        mine.setsockopt(socket.IPPROTO_TCP, 31, b"nosuch")


@attempt
def sign_connections() -> None:
    """TCP_MD5SIG of linux/tcp.h, with a key for 127.0.0.1."""
    key = struct.pack("=HH4s120xBBHI80s", 2, 0, b"\x7f\0\0\1", 0, 0, 4, 0, b"test")
    with socket.socket() as mine:
        mine.setsockopt(socket.IPPROTO_TCP, 14, key)


@attempt
def name_the_senders_of_a_group() -> None:
    """IP_ADD_SOURCE_MEMBERSHIP of ip(7), on the loopback device."""
    wanted = b"".join(map(socket.inet_aton, ("239.1.2.3", "127.0.0.1", "127.0.0.2")))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mine:
        mine.setsockopt(socket.IPPROTO_IP, 39, wanted)


@attempt
def take_a_label_of_ipv6_flows() -> None:
    """IPV6_FLOWLABEL_MGR of linux/in6.h: one for this socket alone (IPV6_FL_S_EXCL)."""
    wanted = socket.inet_pton(socket.AF_INET6, "::1") + struct.pack("=IBBHHHI", 0, 0, 1, 1, 0, 0, 0)
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as mine:
        mine.setsockopt(socket.IPPROTO_IPV6, 32, wanted)


@attempt
def take_huge_pages_by_a_mapping() -> None:
    """MAP_HUGETLB beside MAP_NORESERVE: none has to be there before the memory is touched."""
    call("mmap", 0, 2 << 20, 3, 0x44022, -1, 0)


@attempt
def take_huge_pages_by_a_memory_file() -> None:
    os.close(os.memfd_create("huge", os.MFD_HUGETLB))


@attempt
def take_huge_pages_by_a_segment() -> None:
    """SHM_HUGETLB beside SHM_NORESERVE and IPC_CREAT."""
    segment = call("shmget", 0, 2 << 20, 0o1600 | 0x800 | 0x1000)
    call("shmctl", segment, 0, 0)


def _attach_filter(option: int) -> None:
    """A program of one instruction, "take all of it": socket(7)."""
    program = ctypes.create_string_buffer(struct.pack("=HBBI", 0x06, 0, 0, 0xFFFFFFFF))
    attached = ctypes.create_string_buffer(struct.pack("@HP", 1, ctypes.addressof(program)))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mine:
        call("setsockopt", mine.fileno(), 1, option, attached, len(attached.raw) - 1)


@attempt
def attach_a_filter_to_a_socket() -> None:
    _attach_filter(26)


@attempt
def attach_a_filter_with_high_bits() -> None:
    _attach_filter(26 | 1 << 32)


@attempt
def call_socketpair_of_another_family() -> None:
    call("socketpair", 2, 1, 0, 0)


@attempt
def change_the_network() -> None:
    """RTM_NEWLINK for lo, to be up, as it is: rtnetlink(7)."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as netlink:
        up = struct.pack("=BxHiII", 0, 0, 1, 1, 1)
        header = struct.pack("=IHHII", 16 + len(up), 16, 5, 1, 0)  # NLM_F_REQUEST | NLM_F_ACK
        netlink.settimeout(10)
        netlink.sendto(header + up, (0, 0))
        code = -struct.unpack_from("=i", netlink.recv(4096), 16)[0]
        if code:
            raise OSError(code, os.strerror(code))


@attempt
def configure_an_interface() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sH22x", b"lo", 0)
        flags = fcntl.ioctl(any_socket, 0x8913, request)  # SIOCGIFFLAGS
        fcntl.ioctl(any_socket, 0x8914, flags)  # SIOCSIFFLAGS, the same


@attempt
def force_a_buffer_size() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        any_socket.setsockopt(socket.SOL_SOCKET, 32, 1)  # SO_SNDBUFFORCE


@attempt
def reach_an_abstract_socket_of_the_host() -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect("\0" + GIVEN["abstract"])


@attempt
def reach_a_socket_of_the_host_by_its_path() -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(GIVEN["socket"])


# --- terminals ----------------------------------------------------------------------------------


def terminal() -> int:
    """A terminal of this process's own, which it is also controlled by."""
    _, mine = pty.openpty()
    fcntl.ioctl(mine, termios.TIOCSCTTY, 0)
    return mine


def push(request: int) -> None:
    """Ask for what a terminal does with `request`."""
    character = ctypes.create_string_buffer(b"x")
    call("ioctl", terminal(), request, ctypes.byref(character))


@attempt
def type_into_a_terminal() -> None:
    push(termios.TIOCSTI)


@attempt
def type_into_a_terminal_with_high_bits() -> None:
    push(termios.TIOCSTI | 1 << 32)


@attempt
def paste_into_a_terminal() -> None:
    push(0x541C)


@attempt
def paste_into_a_terminal_with_high_bits() -> None:
    push(0x541C | 1 << 63)


@attempt
def set_a_line_discipline() -> None:
    discipline = ctypes.c_int(0)
    call("ioctl", terminal(), 0x5423, ctypes.byref(discipline))


@attempt
def reopen_the_controlling_terminal() -> None:
    if os.environ.get("OUTSIDE"):
        terminal()
    os.close(os.open("/dev/tty", os.O_RDWR))
