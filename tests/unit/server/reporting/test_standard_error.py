"""The service's standard error: its writer waits for nothing, and a fast reader misses nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import jobworker

SOURCE = str(Path(jobworker.__file__).resolve().parent.parent)
BEGIN = (
    f"import logging, sys; sys.path.insert(0, {SOURCE!r})\n"
    "from jobworker.server.reporting.logs import set_up_logging\n"
    "from jobworker.server.reporting.standard_error import replace_standard_error\n"
    "stream = replace_standard_error()\n"
    "set_up_logging('INFO', 'text')\n"
    "log = logging.getLogger('jobworker.test')\n"
)
THREAD = "stream.start_thread()\n"
NO_THREAD = (  # as under a limit of processes (RLIMIT_NPROC)
    "import threading\n"
    'def refuse(self): raise RuntimeError("can\'t start new thread")\n'
    "threading.Thread.start = refuse\n"
    "stream.start_thread()\n"
)
MANY = 12_000
LOG_MANY = f"for number in range({MANY}): log.info('line %d %s', number, 100 * 'x')\n"
GO_ON = "print('went on', flush=True)\nsys.stdin.readline()\n"


def start(program: str, stderr: int) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-c", BEGIN + program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
    )


def numbers(log: bytes) -> list[int]:
    return [int(line.split()[3]) for line in log.splitlines() if b" INFO line " in line]


@pytest.mark.parametrize("before", ["", THREAD, NO_THREAD])
def test_reader_that_has_stopped_holds_nothing_up_and_is_told_what_it_missed(before: str) -> None:
    read, write = os.pipe()
    with start(f"{before}{LOG_MANY}{GO_ON}log.info('line {MANY} is the last')\n", write) as process:
        os.close(write)
        assert process.stdout is not None
        assert process.stdout.readline() == b"went on\n"
        with open(read, "rb") as log:
            told = b""
            while before == THREAD and b"were lost" not in told:  # without one it writes no more
                told += log.readline()
            assert process.stdin is not None
            process.stdin.close()
            told += log.read()
    assert process.returncode == 0
    lines, seen = told.splitlines(), numbers(told)
    (note,) = [line for line in lines if b" lines before this one were lost" in line]
    lost = MANY + 1 - len(seen)
    assert f" WARNING standard error took nothing for a while: {lost} lines".encode() in note
    assert seen[: lines.index(note)] == list(range(lines.index(note)))
    assert seen[lines.index(note) :] == ([MANY] if before == THREAD else [])


@pytest.mark.parametrize("before", [THREAD, NO_THREAD])
def test_fast_reader_gets_every_line_in_order(before: str, tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as file:
        write = os.dup(file.fileno())
    reader = "while stream._queued_bytes: time.sleep(0.001)"  # it keeps up, on a busy host too
    pause = LOG_MANY.replace(" log.info", f"\n  if number % 1500 == 0:\n    {reader}\n  log.info")
    pause = f"import time\n{pause}"
    with start(f"{before}{pause}", write) as process:
        os.close(write)
        process.communicate(timeout=60)
    assert numbers((tmp_path / "log").read_bytes()) == list(range(MANY))


def test_reader_that_comes_back_at_the_end_gets_what_was_logged() -> None:
    read, write = os.pipe()
    with start(f"{THREAD}{LOG_MANY.replace(str(MANY), '3000')}{GO_ON}", write) as process:
        os.close(write)
        assert process.stdout is not None
        assert process.stdout.readline() == b"went on\n"
        process.stdin.close()  # type: ignore[union-attr]
        time.sleep(0.2)
        with open(read, "rb") as log:
            seen = numbers(log.read())
    assert seen == list(range(3000))


@pytest.mark.parametrize("before", ["", THREAD])
@pytest.mark.parametrize("end", ["", "sys.exit('a reason')\n", "raise ValueError('a fault')\n"])
def test_end_waits_for_a_stopped_reader_a_bounded_moment(before: str, end: str) -> None:
    read, write = os.pipe()
    with start(f"{before}{LOG_MANY}{end}", write) as process:
        os.close(write)
        process.communicate(timeout=20)
    os.close(read)
    assert process.returncode == (1 if end else 0)


@pytest.mark.parametrize("full", [True, False])
def test_log_that_refuses_writes_ends_nothing(full: bool) -> None:
    if full:
        write = os.open("/dev/full", os.O_WRONLY)
    else:
        read, write = os.pipe()
        os.close(read)
    with start(f"{THREAD}{LOG_MANY}{GO_ON}", write) as process:
        os.close(write)
        assert process.communicate(b"", timeout=20)[0] == b"went on\n"
    assert process.returncode == 0


def test_file_on_a_disk_that_has_room_again_tells_what_is_missing(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands for the full disk: it too makes write(2) fail."""
    limit = (
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "def limit(size): resource.setrlimit(resource.RLIMIT_FSIZE, (size, -1))\n"
    )
    program = (
        f"{limit}{THREAD}log.info('before')\nstream.drain(5)\nlimit(10)\n"
        "log.info('lost')\nlog.info('lost')\nstream.drain(5)\nlimit(-1)\nlog.info('after')\n"
    )
    with (tmp_path / "log").open("ab") as file, start(program, file.fileno()) as process:
        process.communicate(timeout=20)
    before, note, after = (tmp_path / "log").read_text().splitlines()
    assert before.endswith("before")
    assert "2 lines before this one were lost" in note
    assert after.endswith("after")


def test_descriptor_keeps_its_mode_for_all_who_share_it() -> None:
    read, write = os.pipe()
    with start(f"{THREAD}{GO_ON}", write) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"went on\n"
        assert os.get_blocking(write)
        process.communicate(b"", timeout=20)
    os.close(read)
    os.close(write)


def test_warnings_and_tracebacks_of_python_go_the_same_way() -> None:
    read, write = os.pipe()
    program = f"import warnings\n{THREAD}warnings.warn('careful')\nraise ValueError('a fault')\n"
    with start(program, write) as process:
        os.close(write)
        process.communicate(timeout=20)
    with open(read, "rb") as log:
        told = log.read()
    assert b"careful" in told
    assert told.endswith(b"ValueError: a fault\n")


def test_signal_ends_a_process_whose_log_is_held() -> None:
    read, write = os.pipe()
    with start(f"{THREAD}{LOG_MANY}{GO_ON}", write) as process:
        os.close(write)
        assert process.stdout is not None
        assert process.stdout.readline() == b"went on\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == -signal.SIGTERM
    os.close(read)


def test_line_is_in_a_regular_file_once_it_is_told(tmp_path: Path) -> None:
    program = (
        "from jobworker.server.reporting import standard_error\n"
        f"standard_error.PROMPT_SECONDS = 20\n{THREAD}"
        "for number in range(300):\n"
        "    log.info('line %d', number)\n"
        f"    assert ' line %d\\n' % number in open({str(tmp_path / 'log')!r}).read()\n"
    )
    with (tmp_path / "log").open("ab") as file, start(program, file.fileno()) as process:
        process.communicate(timeout=60)
    assert process.returncode == 0, (tmp_path / "log").read_text()


def test_disk_that_does_not_answer_holds_up_one_write_for_a_moment(tmp_path: Path) -> None:
    """In the file's place stands a write(2) that waits; `test_standard_streams` has a real disk."""
    program = (
        "import os, threading, time\n"
        "gate, real = threading.Event(), os.write\n"
        "os.write = lambda *of: (gate.wait(), real(*of))[1]\n"
        f"{THREAD}{LOG_MANY.replace(str(MANY), '3000')}{GO_ON}gate.set()\n"
    )
    with (tmp_path / "log").open("ab") as file, start(program, file.fileno()) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"went on\n"
        process.communicate(timeout=60)
    assert numbers((tmp_path / "log").read_bytes()) == list(range(3000))


def test_write_that_had_to_wait_for_the_thread_is_the_last_one_for_a_while(tmp_path: Path) -> None:
    """In the file's place stands a write(2) of 20 ms: so long may a thread lack a processor."""
    program = (
        "import os, threading, time\n"
        "from jobworker.server.reporting import standard_error\n"
        "standard_error.PROMPT_AGAIN_SECONDS = 1000\n"
        "real, wait, waits = os.write, threading.Condition.wait_for, []\n"
        "os.write = lambda *of: (time.sleep(0.02), real(*of))[1]\n"
        "def counted(*of):\n"
        "    if threading.current_thread() is threading.main_thread(): waits.append(of)\n"
        "    return wait(*of)\n"
        f"threading.Condition.wait_for = counted\n{THREAD}"
        "for number in range(20):\n"
        "    log.info('line %d', number)\n"
        "    while not stream._is_idle(): time.sleep(0.001)\n"
        "assert len(waits) == 1, len(waits)\n"
    )
    with (tmp_path / "log").open("ab") as file, start(program, file.fileno()) as process:
        process.communicate(timeout=60)
    assert process.returncode == 0, (tmp_path / "log").read_text()


def test_select_that_fails_does_not_end_the_log() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    program = (
        "import select\n"
        "def fail(*_): raise OSError(12, 'no memory')\n"
        f"select.select, wait = fail, select.select\n{THREAD}{LOG_MANY}{GO_ON}"
        f"select.select = wait\nlog.info('line {MANY} is the last')\nstream.drain(20)\n"
    )
    with start(program, write) as process:
        os.close(write)
        assert process.stdout is not None
        assert process.stdout.readline() == b"went on\n"
        assert process.stdin is not None
        with open(read, "rb") as log:
            process.stdin.close()
            told = log.read()
    assert f"line {MANY} is the last\n".encode() in told
    assert b"were lost" in told


def test_want_of_memory_takes_no_room_from_the_log() -> None:
    read, write = os.pipe()
    program = (
        "import time\n"
        "from collections import deque\n"
        "class Short(deque):\n"
        "    def popleft(self):\n"
        "        piece = super().popleft()\n"
        "        if b'taken' in piece: raise MemoryError\n"
        "        return piece\n"
        f"stream._queue = Short()\n{THREAD}"
        "log.info('taken %s', 900_000 * 'x')\n"
        "while stream._queued_bytes: time.sleep(0.01)\n"
        "log.info('line 1 %s', 900_000 * 'x')\n"
    )
    with start(program, write) as process:
        os.close(write)
        with open(read, "rb") as log:
            assert numbers(log.read()) == [1]
        process.communicate(timeout=60)
