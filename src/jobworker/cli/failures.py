"""How a program ends that could not do what it was asked: one line, and an exit code."""

import sys
from collections.abc import Iterator
from functools import partial

import asyncclick as click
import trio

from jobworker.errors import JobworkerError

INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""


def run_program(program: str, command: click.Command) -> None:
    """Run a command line to its end and exit with its code.

    Usage errors exit with 2; a JobworkerError is told in one line, and exits with its code.
    """
    try:
        result: object = trio.run(partial(command.main, prog_name=program, standalone_mode=False))
    except click.exceptions.Exit as ended:
        sys.exit(ended.exit_code)
    except click.ClickException as misuse:
        misuse.show()
        sys.exit(misuse.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(INTERRUPTED)
    except (JobworkerError, BaseExceptionGroup) as raised:
        leaves = list(_leaves(raised))
        for leaf in leaves:
            if not isinstance(leaf, JobworkerError | KeyboardInterrupt):
                raise
        error = leaves[0]
        if isinstance(error, JobworkerError):
            print(f"{program}: {one_line(str(error))}", file=sys.stderr)  # noqa: T201
            sys.exit(error.exit_code)
        sys.exit(INTERRUPTED)
    sys.exit(result if isinstance(result, int) else 0)


def one_line(text: str) -> str:
    """`text` with control characters made visible: what is told may hold what others chose."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def _leaves(raised: BaseException) -> Iterator[BaseException]:
    if isinstance(raised, BaseExceptionGroup):
        for inner in raised.exceptions:
            yield from _leaves(inner)
    else:
        yield raised
