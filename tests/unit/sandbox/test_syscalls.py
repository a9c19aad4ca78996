"""What the thin functions give back of the kernel's answers, as far as nothing else shows it."""

import errno
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from jobworker.sandbox import syscalls as sc

SOURCE = str(Path(sc.__file__).parents[2])


def test_refusal_of_the_kernel_is_an_error_with_its_number() -> None:
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        sc.setns(-1, 0)
    assert caught.value.errno == errno.EBADF


def test_clone_gives_the_parent_the_childs_pid_and_pidfd() -> None:
    pid, pidfd = sc.clone3(0)
    if pid == 0:
        os._exit(7 if pidfd == -1 else 8)
    ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    os.close(pidfd)
    assert ended is not None
    assert (ended.si_pid, ended.si_status) == (pid, 7)


def test_range_of_descriptors_is_closed_and_nothing_beside_it() -> None:
    pid, pidfd = sc.clone3(0)
    if pid == 0:
        first = os.dup(0)
        for number in range(1, 4):
            os.dup2(0, first + number)
        sc.close_range(first + 1, first + 2)
        there = [Path(f"/proc/self/fd/{first + number}").exists() for number in range(4)]
        os._exit(sum(1 << number for number, is_there in enumerate(there) if is_there))
    ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    os.close(pidfd)
    assert ended is not None
    assert ended.si_status == 0b1001


def test_descriptor_of_another_process_is_copied(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        pidfd = os.pidfd_open(os.getpid())
        copy = sc.pidfd_getfd(pidfd, file.fileno())
        assert os.path.sameopenfile(copy, file.fileno())
        os.close(copy)
        with pytest.raises(OSError, match="Bad file descriptor"):
            sc.pidfd_getfd(pidfd, 999_999)
        os.close(pidfd)


def test_process_shares_memory_and_files_with_itself_and_not_with_another() -> None:
    own = os.getpid()
    with subprocess.Popen(["sleep", "600"]) as other:
        kinds = (sc.KCMP_VM, sc.KCMP_FILES)
        try:
            found = [(sc.kcmp(own, own, kind), sc.kcmp(own, other.pid, kind)) for kind in kinds]
        finally:
            other.kill()
    assert all(same == 0 and different in (1, 2) for same, different in found)


def test_blocks_are_allocated_and_data_is_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"kept")
    with (tmp_path / "file").open("r+b") as file:
        try:
            sc.fallocate(file.fileno(), 1 << 20)
        except OSError as error:
            pytest.skip(f"this file system allocates no blocks ahead: {error}")
        status = os.fstat(file.fileno())
        assert status.st_size == 1 << 20
        assert status.st_blocks * 512 >= 1 << 20
        assert file.read(4) == b"kept"


def test_socket_option_is_read_whole_and_no_longer_than_it_is() -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        value = sc.getsockopt(sock.fileno(), socket.SOL_SOCKET, socket.SO_KEEPALIVE, 64)
    assert value == struct.pack("=i", 1)


def test_file_that_is_no_network_device_is_no_tap(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        assert not sc.is_tap(file.fileno())


def test_file_system_is_told_by_its_number() -> None:
    assert sc.file_system_type("/proc") == 0x9FA0
    with pytest.raises(FileNotFoundError):
        sc.file_system_type("/proc/absent")


def test_machine_whose_numbers_are_unknown_is_refused() -> None:
    code = (
        f"import os, sys; sys.path.insert(0, {SOURCE!r})\n"
        "from types import SimpleNamespace\n"
        "os.uname = lambda: SimpleNamespace(machine='riscv64')\n"
        "import jobworker.sandbox.syscalls"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], stderr=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode == 1
    assert "jobworker runs jobs on x86-64 and arm64 kernels, not on riscv64" in done.stderr
