"""Lines for the launcher's log: told where there is room, and never waited for."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import jobworker
from jobworker.sandbox.log import BoundedLog

SOURCE = str(Path(jobworker.__file__).resolve().parent.parent)
MANY = (
    f"import sys; sys.path.insert(0, {SOURCE!r})\n"
    "from jobworker.sandbox.log import open_log, log_line\n"
    "if sys.argv[1:]: open_log()\n"
    "for number in range(5000): log_line(f'line {number} ' + 100 * 'x')\n"
    "print('went on', flush=True)\n"
    "sys.stdin.read()\n"
    "log_line('room again')\n"
)


def start(stderr: int, *arguments: str, program: str = MANY) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-I", "-c", program, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
    )


@pytest.mark.parametrize("kind", ["pipe", "socket"])
@pytest.mark.parametrize("arguments", [[], ["opened"]])
def test_reader_that_has_stopped_holds_nothing_up_and_is_told_what_it_missed(
    kind: str, arguments: list[str]
) -> None:
    if kind == "pipe":
        read, write = os.pipe()
    else:
        read, write = (end.detach() for end in socket.socketpair())
    with start(write, *arguments) as process:
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


def test_line_has_the_form_of_the_services_own() -> None:
    program = "\n".join(MANY.splitlines()[:2]) + "\nlog_line('a word')\n"
    with start(subprocess.PIPE, program=program) as process:
        _, told = process.communicate(b"", timeout=20)
    form = rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z WARNING launcher: a word\n"
    assert re.fullmatch(form, told)


def test_uncaught_exception_is_told_and_ends_the_process_whether_or_not_there_is_room() -> None:
    raises = "open_log()\nsys.stdin.read()\ndef f(): raise ValueError('a fault')\nf()\n"
    program = "\n".join(MANY.splitlines()[:2]) + f"\n{raises}"
    with start(subprocess.PIPE, program=program) as process:
        _, told = process.communicate(b"", timeout=20)
    assert b"ERROR launcher: ValueError: a fault" in told
    assert b" in f, " in told
    with start(subprocess.PIPE, program=f"{MANY}{raises}") as process:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(20) == 1


def test_other_writer_that_takes_the_room_holds_nothing_up() -> None:
    """After poll(2) has found room, before the write: here the poll itself takes the room."""
    taking = (
        "import os, select\n"
        "class Poll:\n"
        "    def register(self, *_): pass\n"
        "    def poll(self, _):\n"
        "        os.set_blocking(2, False)\n"
        "        try:\n"
        "            while True: os.write(2, 1000 * b'x')\n"
        "        except BlockingIOError: os.set_blocking(2, True)\n"
        "        return [(2, select.POLLOUT)]\n"
        "select.poll = Poll\n"
    )
    head, rest = MANY.split("for number", 1)
    read, write = os.pipe()
    with start(write, "opened", program=f"{head}{taking}for number{rest}") as process:
        os.close(write)
        try:
            assert process.communicate(b"", timeout=20)[0] == b"went on\n"
        finally:
            os.close(read)  # which wakes one that waits


def test_lines_that_another_process_causes_are_bounded_and_counted(
    capfd: pytest.CaptureFixture[str],
) -> None:
    bounded, most = BoundedLog(), BoundedLog.MOST_LINES
    for number in range(10 * most):
        bounded.line(f"line {number}")
    assert capfd.readouterr().err.count("\n") == most
    bounded.PERIOD_SECONDS = 0
    bounded.line("later")
    assert f"later ({9 * most} lines like it were left out)" in capfd.readouterr().err
    bounded.line("last")
    assert capfd.readouterr().err.endswith("last\n")
