"""Lines for the launcher's log: told where there is room, and never waited for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import jobworker

SOURCE = str(Path(jobworker.__file__).resolve().parent.parent)
MANY = (
    f"import sys; sys.path.insert(0, {SOURCE!r})\n"
    "from jobworker.sandbox.announce import say\n"
    "for number in range(5000): say(f'line {number} ' + 100 * 'x')\n"
    "print('went on', flush=True)\n"
    "sys.stdin.read()\n"
    "say('room again')\n"
)


def start(stderr: int) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-I", "-c", MANY],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
    )


def test_reader_that_has_stopped_holds_nothing_up_and_is_told_what_it_missed() -> None:
    read, write = os.pipe()
    with start(write) as process:
        os.close(write)
        assert process.stdout is not None
        assert process.stdout.readline() == b"went on\n"
        with open(read, "rb") as log:
            assert b"line 0 " in log.readline()
            os.set_blocking(read, False)
            while log.read(65536):
                pass
            os.set_blocking(read, True)
            process.communicate(b"", timeout=20)
            last = log.read()
    assert b"room again" in last
    assert b"lines before this one were lost" in last


@pytest.mark.parametrize("full", [True, False])
def test_log_that_takes_nothing_ends_nothing(full: bool) -> None:
    if full:
        write = os.open("/dev/full", os.O_WRONLY)
    else:
        read, write = os.pipe()
        os.close(read)
    with start(write) as process:
        os.close(write)
        assert process.communicate(b"", timeout=20)[0] == b"went on\n"
    assert process.returncode == 0
