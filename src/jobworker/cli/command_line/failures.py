"""Run a command line and end the program: a failure is one line on standard error and a code."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import NoReturn, TextIO

import asyncclick as click
import trio

from jobworker.cli.command_line.hints import hint
from jobworker.errors import ConfigError, JobworkerError, PrintFailed

CLOSED = "standard output is closed"
INTERRUPTED = 130
"""128 + SIGINT, as in shells."""
SERVER_MODULES = frozenset({"apsw"})
"""Modules that only the extra `server` of the package installs."""
BROKEN_PIPE = 141
"""128 + SIGPIPE, as in shells."""


def run_program(program: str, command: click.Command) -> None:
    """Run a command line to its end and exit with its code.

    A usage error exits with 2. A JobworkerError is printed in one line and exits with its code.
    """
    try:
        _run(program, command)
    finally:
        _drop_refused_notes()


def _run(program: str, command: click.Command) -> NoReturn:
    """Run a command line to its end, print a failure, and exit with the code."""
    _watch_for_closed_output(command)
    try:
        result: object = trio.run(partial(command.main, prog_name=program, standalone_mode=False))
    except click.exceptions.Exit as ended:
        sys.exit(ended.exit_code)
    except SystemExit as ended:
        # Click exits so, with 1, if the reader of standard output has closed its end.
        sys.exit(BROKEN_PIPE if isinstance(ended.__context__, BrokenPipeError) else ended.code)
    except click.ClickException as misuse:
        _print_misuse(program, misuse)
        sys.exit(misuse.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(INTERRUPTED)
    except ModuleNotFoundError as missing:
        if missing.name not in SERVER_MODULES:
            raise
        absent = ConfigError(
            f"cannot do this: the Python module {missing.name} is not installed; the server needs "
            "it, the client does not",
            remedy="pip install 'jobworker[server]' (in a clone: pip install '.[server]')",
        )
        print_note(f"{program}: {absent}")
        sys.exit(absent.exit_code)
    except (JobworkerError, BaseExceptionGroup) as raised:
        found = list(leaves(raised))
        if not all(isinstance(leaf, JobworkerError | KeyboardInterrupt) for leaf in found):
            raise
        error = found[0]
        if isinstance(error, JobworkerError):
            print_note(f"{program}: {one_line(str(error))}")
            sys.exit(error.exit_code)
        sys.exit(INTERRUPTED)
    except OSError as error:
        if not _is_from_printing(error):
            raise
        code, failed = end_of_printing(error)
        if failed is not None:
            print_note(f"{program}: {one_line(str(failed))}")
        sys.exit(code)
    sys.exit(result if isinstance(result, int) else 0)


def _print_misuse(program: str, misuse: click.ClickException) -> None:
    """Print a usage error in one line; for a group without a command, print the group's help."""
    if isinstance(misuse, click.exceptions.NoArgsIsHelpError):
        with suppress(OSError):
            misuse.show()
        return
    message, remedy = describe_misuse(misuse, program)
    print_note(f"{program}: {one_line(message)}; {remedy}")


def describe_misuse(misuse: click.ClickException, program: str) -> tuple[str, str]:
    """The message and the remedy of a usage error."""
    context = getattr(misuse, "ctx", None)
    remedy = f"see {program if context is None else context.command_path} --help"
    if isinstance(misuse, click.exceptions.NoArgsIsHelpError):
        return "Missing command", remedy
    if context is not None and (meant := hint(context.command_path, misuse.message)):
        return misuse.message.rstrip("."), meant
    if alike := getattr(misuse, "possibilities", None):
        return misuse.message.rstrip("."), f"perhaps {', '.join(alike)}; {remedy}"
    return misuse.format_message().rstrip("."), remedy


class _Context(click.Context):
    """A command's context. Click calls `aexit` after it has printed a help text or a version."""

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        tb: TracebackType | None,
    ) -> bool | None:
        """See click.Context. Adds the command to a usage error of click's parser without one."""
        if isinstance(exc_value, click.UsageError) and exc_value.ctx is None:
            exc_value.ctx = self
        return await super().__aexit__(exc_type, exc_value, tb)

    async def aexit(self, code: int = 0) -> NoReturn:
        """See click.Context. Raises PrintFailed if standard output is closed: click ignores it."""
        if code == 0 and sys.stdout is None:
            raise cannot_print(CLOSED)
        await super().aexit(code)


def _watch_for_closed_output(command: click.Command) -> None:
    """Make a command and its subcommands fail if they cannot print a help text."""
    command.context_class = _Context
    if isinstance(command, click.Group):
        for each in command.commands.values():
            _watch_for_closed_output(each)


def print_note(line: str) -> None:
    """Print a line on standard error. A failed write is ignored: the exit code still counts."""
    with suppress(OSError):
        click.echo(line, err=True)


def one_line(text: str) -> str:
    """`text` with control characters made visible: it may contain text that other users chose."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def end_of_printing(error: OSError) -> tuple[int, PrintFailed | None]:
    """The exit code after a failed write to standard output, and an error to print.

    The error is None for a broken pipe: other programs exit silently then, too.
    """
    _discard(sys.stdout)
    if error.errno == errno.EPIPE:
        return BROKEN_PIPE, None
    failed = cannot_print(os.strerror(error.errno or 0))
    return failed.exit_code, failed


def cannot_print(why: str) -> PrintFailed:
    """The error for output that cannot be printed."""
    return PrintFailed(
        f"cannot print: {why}",
        remedy="check where standard output and standard error go; what was done is not undone",
    )


def _drop_refused_notes() -> None:
    """Drop notes that standard error refused: Python would write them again and exit with 120."""
    try:
        if sys.stderr is not None:
            sys.stderr.flush()
    except OSError:
        _discard(sys.stderr)


def _discard(file: TextIO | None) -> None:
    """Drop the buffered text of a standard stream, which would fail at exit."""
    with suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, file.fileno())  # type: ignore[union-attr]
        os.close(null)


def _is_from_printing(error: OSError) -> bool:
    """Whether click raised the error: click writes to the standard streams only."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place is not None and place.tb_frame.f_code.co_filename == click.utils.__file__


def leaves(raised: BaseException) -> Iterator[BaseException]:
    """Yield the exceptions in a group and its nested groups, or `raised` if it is no group."""
    if isinstance(raised, BaseExceptionGroup):
        for inner in raised.exceptions:
            yield from leaves(inner)
    else:
        yield raised


def print_text(text: str) -> None:
    """Print one or more lines on standard output. Raises PrintFailed if it is closed."""
    if sys.stdout is None:
        raise cannot_print(CLOSED)
    click.echo(text)
