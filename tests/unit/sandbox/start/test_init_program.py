"""The init: executed for real, in front of a trampoline with an order of the test's own."""

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobworker.sandbox import channel
from jobworker.sandbox.start import init_program, trampoline
from jobworker.sandbox.start.steps import ChangeDirectory, Execute

SOURCES = Path(init_program.__file__).parent
Outcome = tuple[tuple[int | None, int | None] | None, int]


@pytest.fixture
def run() -> Iterator[Callable[..., Outcome]]:
    """Has an init run a shell script: what it reports, and its own exit status."""
    program, init = trampoline.open_program(), init_program.open_init()

    def go(script: str, *signals: int) -> Outcome:
        exec_image = trampoline.exec_image(
            ChangeDirectory("/"), Execute(("/bin/sh", "-c", script), (("PATH", "/usr/bin:/bin"),))
        )
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        order = os.memfd_create("order")
        os.write(order, exec_image.image)
        report, tell = os.pipe2(os.O_CLOEXEC)
        pid = os.fork()
        if pid == 0:
            wanted = (theirs.fileno(), order, program, tell)
            away = [os.dup2(each, 100 + number) for number, each in enumerate(wanted)]
            for number, each in enumerate(away, 3):
                os.dup2(each, number)
            os.dup2(init, 99)
            os.closerange(100, 110)
            os.execve(99, ["init"], {})
        for descriptor in (order, tell):
            os.close(descriptor)
        theirs.close()
        assert channel.receive(ours) == ({"ready": True}, [])
        ours.send(trampoline.GO)
        assert ours.recv(4096) == b"", "the program runs: nobody holds the socket any more"
        for number in signals:
            os.kill(pid, number)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        told = init_program.reported(report)
        ours.close()
        os.close(report)
        return told, status

    yield go
    os.close(program)
    os.close(init)


def test_program_ends_it_by_its_code(run: Callable[..., Outcome]) -> None:
    assert run("exit 0") == ((0, None), 0)
    assert run("exit 7") == ((7, None), 7)
    assert run("exit 255") == ((255, None), 255)


def test_program_ends_it_by_its_signal(run: Callable[..., Outcome]) -> None:
    assert run("kill -TERM $$") == ((None, signal.SIGTERM), 128 + signal.SIGTERM)
    assert run("kill -KILL $$") == ((None, signal.SIGKILL), 128 + signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, 40])
def test_signal_reaches_the_program(run: Callable[..., Outcome], number: int) -> None:
    assert run("sleep 60 & wait", number) == ((None, number), 128 + number)


def test_program_may_take_a_signal_as_it_likes(tmp_path: Path, run: Callable[..., Outcome]) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    script = f"trap 'exit 9' TERM; kill -TERM $PPID; read x < {fifo}"
    assert run(script) == ((9, None), 9)


def test_signal_to_the_whole_group_does_not_come_back(run: Callable[..., Outcome]) -> None:
    assert run("trap 'exit 4' TERM; kill -TERM 0; sleep 60") == ((4, None), 4)


def test_program_inherits_no_descriptor(run: Callable[..., Outcome]) -> None:
    script = "for n in 3 4 5 6 7 8 9; do [ -e /proc/self/fd/$n ] && exit 1; done; exit 0"
    assert run(script) == ((0, None), 0)


def test_without_its_descriptors_it_does_nothing() -> None:
    init = init_program.open_init()
    try:
        os.dup2(init, 50)
        done = subprocess.run(["/proc/self/fd/50"], pass_fds=[50], capture_output=True, check=False)
    finally:
        os.close(init)
        os.close(50)
    assert (done.returncode, done.stdout, done.stderr) == (127, b"", b"")


def test_report_that_is_none_is_taken_as_none() -> None:
    report, tell = os.pipe2(os.O_NONBLOCK)
    assert init_program.reported(report) is None, "nothing yet"
    os.write(tell, b"ab")
    assert init_program.reported(report) is None, "cut short"
    os.close(tell)
    assert init_program.reported(report) is None, "the init was killed"
    os.close(report)


@pytest.mark.parametrize(("machine", "prefix"), [("x86_64", ""), ("aarch64", "aarch64-linux-gnu-")])
def test_bytes_are_what_the_assembler_makes_of_the_source(
    machine: str, prefix: str, tmp_path: Path
) -> None:
    if machine == os.uname().machine:
        prefix = ""
    elif not prefix:
        pytest.skip("needs an assembler for x86-64")
    if shutil.which(f"{prefix}as") is None:
        pytest.skip(f"needs {prefix}as (binutils)")
    made, code = tmp_path / "made.o", tmp_path / "code"
    subprocess.run([f"{prefix}as", "-o", made, SOURCES / f"init_{machine}.S"], check=True)
    subprocess.run([f"{prefix}objcopy", "-O", "binary", "-j", ".text", made, code], check=True)
    assert init_program.program(machine).endswith(code.read_bytes())
