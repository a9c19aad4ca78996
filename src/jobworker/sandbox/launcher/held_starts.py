"""A start that is held where it is, so that it can be told for sure whether its program runs.

Whoever gives up a start must know that its program has not run, since the job may be started again.
What tells that is the child's socket, which execve(2) closes; but so does the child's death, and a
look that is followed by a kill leaves room for an execve in between. So the child is stopped first:

    SIGSTOP      pending at once; no program gets to an instruction of its own from here on
    look         closed: the program was executed before, and goes on (SIGCONT)
    SIGKILL      an execve that went through after the look is not followed by an instruction

A signal that is pending is taken before the kernel returns to a process, from execve(2) too, which
keeps it; and neither signal can be caught or blocked, by PID 1 of a namespace below ours no more
than by others (pid_namespaces(7)). So nobody waits here for a child to stop.

An init has a child of its own that executes the program, which the signal does not reach. Its start
is held for sure only while the init itself has not been executed.

Standard library only.
"""

import contextlib
import signal

from jobworker.sandbox.fork_server import NAME
from jobworker.sandbox.launcher.child import Child


def hold(child: Child) -> bool:
    """Stop a child that has not ended; whether its program cannot begin to run any more."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(child.pidfd, signal.SIGSTOP)
    return child.report < 0 or _has_executed_nothing(child)


def go_on(child: Child) -> None:
    """Undo `hold`."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(child.pidfd, signal.SIGCONT)


def _has_executed_nothing(child: Child) -> bool:
    """Whether a child has its maker's name still, which execve(2) changes."""
    try:
        with open(f"/proc/{child.pid}/comm", encoding="utf-8", errors="replace") as name:
            return name.read().strip() == NAME
    except OSError:
        return False
