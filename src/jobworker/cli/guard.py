"""The process between `worker demo` and its service: the service ends when the demonstration ends.

A demonstration that is killed (SIGKILL, want of memory) can end nothing itself. So its service runs
below a guard, whose standard input is a pipe that only the demonstration holds open: end of file
says that the demonstration is dead. The guard then ends the service and removes the directory,
which holds the key of a CA. SIGTERM has the guard end the service and leave the directory to the
demonstration, which looks for what was left behind. A guard that is killed ends nothing, but it
leads a session, all of which the demonstration then ends.

PR_SET_PDEATHSIG (prctl(2)) was rejected. The kernel sends it when the thread that started the
process ends: here a thread of Trio's, which ends when it is idle. And a change of user clears it,
which the service makes. Standard library only: the guard is there at once.
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
    """The command of a guard for the command of a service whose files are in `directory`."""
    code = "from jobworker.cli.guard import main; main()"
    return [sys.executable, "-c", code, directory, *service]


def main() -> None:
    """Run a service until it ends, a signal asks for its end or standard input ends."""
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
    if _wait([sys.stdin.fileno()], 0):  # nobody else is left who would remove it
        shutil.rmtree(directory, ignore_errors=True)
    sys.exit(process.returncode if process.returncode >= 0 else 128 - process.returncode)


def _wait(descriptors: list[int], seconds: float | None = None) -> bool:
    """Wait until one of them can be read, or has ended: whether one can."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(None if seconds is None else seconds * 1000))
