"""Only a regular file is opened, and nothing is waited for."""

import errno
import fcntl
import os
import signal
import socket
from pathlib import Path

import pytest

from jobworker.regular_file import NotText, open_regular, read_regular, read_text

from ..descriptors import descriptors


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR, os.O_WRONLY])
def test_fifo_is_refused_at_once(flags: int, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    before = descriptors()
    with pytest.raises(OSError, match="not a regular file"):
        open_regular(tmp_path / "fifo", flags)
    assert descriptors() == before


def test_file_that_another_has_a_lease_on_is_refused_at_once(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as leased:
        fcntl.fcntl(leased, fcntl.F_SETSIG, signal.SIGWINCH)  # ignored: the holder is told so
        fcntl.fcntl(leased, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        with pytest.raises(OSError, match="lease") as refused:
            open_regular(tmp_path / "file", os.O_RDONLY)
    assert refused.value.errno == errno.EBUSY


def test_regular_file_is_opened_and_closed_at_exec(tmp_path: Path) -> None:
    opened = open_regular(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    with open(opened, "r+b") as file:
        file.write(b"x")
        assert not os.get_inheritable(opened)
    assert (tmp_path / "file").read_bytes() == b"x"


@pytest.mark.parametrize("kind", ["fifo", "device", "socket", "directory"])
def test_nothing_but_a_regular_file_is_read(kind: str, tmp_path: Path) -> None:
    path, peer = tmp_path / "path", socket.socket(socket.AF_UNIX)
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "device":
            path = Path("/dev/zero")
        case "socket":
            peer.bind(str(path))
        case _:
            path.mkdir()
    why = "a directory" if kind == "directory" else "not a regular file"
    with peer, pytest.raises(OSError, match=f"it is {why}") as refused:
        read_regular(path, 100)
    assert refused.value.errno == errno.EINVAL


def test_file_of_more_bytes_than_the_bound_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    assert read_regular(path, 100) == b"x" * 100
    os.truncate(path, 1 << 40)
    with pytest.raises(OSError, match="larger than 100 bytes") as refused:
        read_regular(path, 100)
    assert refused.value.errno == errno.EFBIG


@pytest.mark.parametrize(
    ("content", "why"),
    [(b"\xff", "not UTF-8 text"), (b"\xef\xbb\xbfa = 1\n", "begins with a byte order mark")],
)
def test_text_is_utf_8_without_a_byte_order_mark(content: bytes, why: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(NotText, match=why):
        read_text(path)


def test_lines_of_other_systems_end_as_here(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes("é\r\nb\rc\n".encode())
    assert read_text(path) == "é\nb\nc\n"
