"""Makes attempts, each in a process of its own, and prints what came of each as one JSON object.

The text of this file, of one module of attempts and of a call of `main` make a program that runs
unchanged inside a job and, as the control, on the host: standard library only. An attempt that
succeeds is "done", one that the kernel refuses has the errno's name for an outcome.

    GIVEN    JSON in the environment: numbers of system calls, paths and pids to attack
    OUTSIDE  in the environment of the control: its mounts, IPC and host name are its own
"""

import ctypes
import errno
import json
import os
import select
import signal
import stat
import sys
from collections.abc import Callable

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
GIVEN = json.loads(os.environ.get("GIVEN", "{}"))
ATTEMPTS: dict[str, Callable[[], object]] = {}

NEWNS, NEWCGROUP, NEWUTS, NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
NEWUSER, NEWPID, NEWNET, NEWTIME = 0x10000000, 0x20000000, 0x40000000, 0x80
SECONDS = 20


class Covered(Exception):
    """What was opened is only the mask over it."""


def attempt(function: Callable[[], object]) -> Callable[[], object]:
    """Make the function one of the attempts."""
    ATTEMPTS[function.__name__] = function
    return function


def check(result: int) -> int:
    """The result of a call of the C library; raises OSError."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def call(name: str, *arguments: object) -> int:
    """A system call by its name; raises OSError."""
    words = [ctypes.c_ulong(a & (1 << 64) - 1) if isinstance(a, int) else a for a in arguments]
    return int(check(libc.syscall(ctypes.c_long(GIVEN["numbers"][name]), *words)))


def open_uncovered(path: str, flags: int) -> int:
    """Open a file that is no mask; nothing is written to it."""
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    if stat.S_ISCHR(status.st_mode) and status.st_rdev == os.makedev(1, 3):
        raise Covered(path)
    return descriptor


def outcome_of(function: Callable[[], object]) -> str:
    """Run an attempt here and say what came of it."""
    try:
        value = function()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    except Covered:
        return "masked"
    return "done" if value is None or value is True else f"value: {value}"


def apart(function: Callable[[], object]) -> str:
    """Run an attempt in a process of its own and say what came of it."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.close(read)
        said = "broken"
        try:
            if os.environ.get("OUTSIDE"):
                check(libc.unshare(NEWNS | NEWUTS | NEWIPC))
                check(libc.mount(None, b"/", None, 0x44000, None))  # MS_REC | MS_PRIVATE
            said = outcome_of(function)
        except BaseException as fault:  # noqa: BLE001 - told as the outcome
            said = f"broken: {type(fault).__name__}: {fault}"
        finally:
            os.write(write, said.encode())
            os._exit(0)
    os.close(write)
    if not select.select([read], [], [], SECONDS)[0]:
        os.kill(pid, signal.SIGKILL)
        said = "hung"
    else:
        said = os.read(read, 4096).decode()
    os.close(read)
    _, status = os.waitpid(pid, 0)
    if not said:
        said = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "nothing"
    return said


def main() -> None:
    """Make every attempt, or those that are named, and print the outcomes."""
    names = sys.argv[1:] or list(ATTEMPTS)
    print(json.dumps({name: apart(ATTEMPTS[name]) for name in names}))  # noqa: T201
