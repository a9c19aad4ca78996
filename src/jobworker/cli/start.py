"""Entry points of `worker-cli` and `worker`: Ctrl-C prints no traceback during imports and exit.

Python raises KeyboardInterrupt in whatever code runs. During an import or the interpreter's
shutdown, nothing can catch it, and the user gets twenty lines of traceback. So SIGINT has its
default action, which ends the process at once, until `main` can handle it, and again after `main`.
If SIGINT is ignored at the start, it stays ignored. The start of Python itself, before this module,
cannot be protected.
"""

# The C module below `signal`. Importing `signal` itself would import `enum`, `functools` and
# `collections`, and these imports take longer than the time that they would protect.
import _signal as signal  # type: ignore[import-not-found]


def worker_cli() -> None:
    """Run `worker-cli` with the process's arguments."""
    _die_of_interrupts()
    from jobworker.cli.worker_cli.main import main

    try:
        _raise_interrupts()
        main()
    finally:
        _die_of_interrupts()


def worker() -> None:
    """Run `worker` with the process's arguments."""
    _die_of_interrupts()
    from jobworker.cli.worker.main import main

    try:
        _raise_interrupts()
        main()
    finally:
        _die_of_interrupts()


def _die_of_interrupts() -> None:
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _raise_interrupts() -> None:
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
