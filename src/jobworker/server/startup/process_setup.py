"""The process's umask, signals and standard error, which `worker serve` and `worker launcher` set.

They set them before anything else. The process that starts them may have any umask, such as one
that hides the state directory from the service's user, or opens it to everyone. A reload (SIGHUP)
may come at any moment, long before there is something to reload, and by default this signal ends a
process.
"""

import os
import signal

from jobworker.server.reporting.standard_error import StandardError, replace_standard_error

UMASK = 0o022
"""Other users may read files and pass directories; secret ones get a mode of their own."""


ENDS = (signal.SIGTERM, signal.SIGINT)


class _Hangup:
    came = False


class _End:
    came: signal.Signals | None = None


def set_up_process() -> StandardError:
    """Set the umask, keep SIGHUP for later, and replace standard error by one that does not wait.

    Returns the new standard error.
    """
    os.umask(UMASK)
    defer_hangups()
    return replace_standard_error()


def defer_hangups() -> None:
    """Handle SIGHUP: it does not end the process, and `take_deferred_hangup` reports it later."""
    signal.signal(signal.SIGHUP, _keep_hangup)


def take_deferred_hangup() -> bool:
    """Whether a SIGHUP has come since the last call that no other code has handled."""
    came, _Hangup.came = _Hangup.came, False
    return came


def ignore_hangups() -> None:
    """Ignore SIGHUP from now on, also in a program that this process executes in its place.

    An ignored signal stays ignored to the end of the process. Python restores the default action of
    a handled signal some time before the process ends.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def _keep_hangup(*_: object) -> None:
    _Hangup.came = True


def keep_ends() -> None:
    """Handle SIGTERM and SIGINT from now on: they do not end the process.

    A process that ends in order must not be cut short by a second signal: a supervisor may send
    another one, and so may a user with a second Ctrl-C.
    """
    for number in ENDS:
        signal.signal(number, _keep_end)


def kept_end() -> signal.Signals | None:
    """The last SIGTERM or SIGINT since `keep_ends` that no other code has handled."""
    return _End.came


def ignore_ends() -> None:
    """Ignore SIGTERM and SIGINT from now on, as `ignore_hangups` does with SIGHUP."""
    for number in ENDS:
        signal.signal(number, signal.SIG_IGN)


def _keep_end(number: int, _: object) -> None:
    _End.came = signal.Signals(number)
