"""Only a regular file is opened, and nothing is waited for."""

import errno
import fcntl
import os
import signal
from pathlib import Path

import pytest

from jobworker.regular_file import open_regular

from ..descriptors import descriptors


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR, os.O_WRONLY])
def test_fifo_is_refused_at_once(flags: int, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    before = descriptors()
    with pytest.raises(OSError, match=r"not a regular file|No such device"):
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
