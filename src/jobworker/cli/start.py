"""Where `worker-cli` and `worker` begin and end: Ctrl-C is silent while Python loads and unloads.

Python raises KeyboardInterrupt wherever it is. Inside of an import, or when the interpreter shuts
down, nothing can catch it, and a person who changed their mind is shown twenty lines of a trace. So
SIGINT ends the process at once, as it ends a program in C, until the program can answer it and
after it has. Where somebody has SIGINT ignored, it stays ignored. What comes before this module,
the start of Python itself, is beyond our reach.
"""

# The C module below `signal`, whose own import (`enum`, `functools`, `collections`) takes longer
# than all that it would protect from here.
import _signal as signal  # type: ignore[import-not-found]


def worker_cli() -> None:
    """Run `worker-cli` with the process's arguments."""
    _die_of_interrupts()
    from jobworker.cli.app import main

    try:
        _raise_interrupts()
        main()
    finally:
        _die_of_interrupts()


def worker() -> None:
    """Run `worker` with the process's arguments."""
    _die_of_interrupts()
    from jobworker.cli.admin import main

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
