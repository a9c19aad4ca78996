"""The process between `worker demo` and its service: the service ends when the demonstration ends.

A demonstration that is killed (SIGKILL, out of memory) cannot end its service. So the service runs
below a guard, whose standard input is a pipe that only the demonstration holds open. At end of file
the demonstration is dead, and the guard ends the service and removes its directory, which contains
the key of a CA. At SIGTERM, the guard ends the service and leaves the directory to the
demonstration, which checks what is left behind. A guard that is killed ends nothing, but it leads a
session, and the demonstration then ends all processes of this session.

PR_SET_PDEATHSIG (prctl(2)) was rejected. The kernel sends that signal when the thread ends that
started the process: here a thread of Trio's, which ends when it is idle. Also, a change of user
clears it, and the service changes its user. Standard library only, so that the guard starts fast.
"""

import os
import select
import shutil
import signal
import subprocess
import sys

GRACE_SECONDS = 25
"""Less than the demonstration waits for the guard."""
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def command(directory: str, service: list[str]) -> list[str]:
    """The command line of a guard for the command line `service`, with its files in `directory`."""
    code = "from jobworker.cli.worker.guard import main; main()"
    return [sys.executable, "-c", code, directory, *service]


def main() -> None:
    """Run a service until it ends, a signal of `ENDING` arrives, or standard input ends."""
    directory, *service = sys.argv[1:]
    asked, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    for number in ENDING:
        signal.signal(number, lambda *_: None)
    with subprocess.Popen(service, stdin=subprocess.DEVNULL) as process:
        ended = os.pidfd_open(process.pid)
        _wait([sys.stdin.fileno(), asked, ended])
        process.terminate()
        if not _wait([ended], GRACE_SECONDS):
            process.kill()
    if _wait([sys.stdin.fileno()], 0):  # the demonstration is dead and cannot remove it
        shutil.rmtree(directory, ignore_errors=True)
    sys.exit(process.returncode if process.returncode >= 0 else 128 - process.returncode)


def _wait(descriptors: list[int], seconds: float | None = None) -> bool:
    """Wait until one descriptor is readable or at its end. Returns False after `seconds`."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(None if seconds is None else seconds * 1000))
