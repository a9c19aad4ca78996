"""What `worker serve` and `worker launcher` set before they do anything: their process's traits.

Whoever starts them may have left them anything: a umask that hides the state directory from the
service's user, or opens it to everyone; and a reload (SIGHUP) may come at any moment, long before
there is something to reload. By default that signal ends a process.
"""

import os
import signal

from jobworker.server.standard_error import StandardError, be_patient

UMASK = 0o022
"""Others may pass and read; what is secret is made so by its own mode."""


class _Hangup:
    came = False


def begin() -> StandardError:
    """Take a known umask, keep SIGHUP for later, and never wait for standard error."""
    os.umask(UMASK)
    keep_hangups()
    return be_patient()


def keep_hangups() -> None:
    """Let SIGHUP end nothing, and note it for `take_hangup`."""
    signal.signal(signal.SIGHUP, _keep_hangup)


def take_hangup() -> bool:
    """Whether SIGHUP has come since the last call, while nobody acted upon it."""
    came, _Hangup.came = _Hangup.came, False
    return came


def ignore_hangups() -> None:
    """Ignore SIGHUP from now on, also in a program that is executed in this process's place.

    Python gives a signal that it handles its default action back, some time before a process ends.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def _keep_hangup(*_: object) -> None:
    _Hangup.came = True
