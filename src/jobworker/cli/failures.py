"""How a program ends that could not do what it was asked: one line, and an exit code."""

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

from jobworker.cli.hints import hint
from jobworker.errors import ConfigError, JobworkerError, PrintFailed

CLOSED = "standard output is closed"
INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""
SERVER_MODULES = frozenset({"apsw"})
"""What the extra `server` of the package brings along."""
BROKEN_PIPE = 141
"""128 + SIGPIPE, as shells have it."""


def run_program(program: str, command: click.Command) -> None:
    """Run a command line to its end and exit with its code.

    Usage errors exit with 2; a JobworkerError is told in one line, and exits with its code.
    """
    try:
        _run(program, command)
    finally:
        _give_up_notes()


def _run(program: str, command: click.Command) -> NoReturn:
    """Run a command line to its end, and tell what failed; exit with its code."""
    _watch_for_closed_output(command)
    try:
        result: object = trio.run(partial(command.main, prog_name=program, standalone_mode=False))
    except click.exceptions.Exit as ended:
        sys.exit(ended.exit_code)
    except SystemExit as ended:
        # Click's own, for standard output whose reader has left: with 1.
        sys.exit(BROKEN_PIPE if isinstance(ended.__context__, BrokenPipeError) else ended.code)
    except click.ClickException as misuse:
        _tell_misuse(program, misuse)
        sys.exit(misuse.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(INTERRUPTED)
    except ModuleNotFoundError as missing:
        if missing.name not in SERVER_MODULES:
            raise
        absent = ConfigError(
            f"cannot do this: the Python module {missing.name} is not installed, which the server "
            "needs and the client does not",
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


def _tell_misuse(program: str, misuse: click.ClickException) -> None:
    """Tell misuse in one line; a group's name alone has the group's help shown, in many."""
    if isinstance(misuse, click.exceptions.NoArgsIsHelpError):
        with suppress(OSError):
            misuse.show()
        return
    message, remedy = words_of(misuse, program)
    print_note(f"{program}: {one_line(message)}; {remedy}")


def words_of(misuse: click.ClickException, program: str) -> tuple[str, str]:
    """What is wrong with a command line, and where to read how it is meant."""
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
    """A command's context. Click ends through `aexit` when it has printed a help or a version."""

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        tb: TracebackType | None,
    ) -> bool | None:
        """See click.Context. Misuse that click's parser finds gets its command: it names none."""
        if isinstance(exc_value, click.UsageError) and exc_value.ctx is None:
            exc_value.ctx = self
        return await super().__aexit__(exc_type, exc_value, tb)

    async def aexit(self, code: int = 0) -> NoReturn:
        """See click.Context. Raises PrintFailed where nothing was printed: click says nothing."""
        if code == 0 and sys.stdout is None:
            raise cannot_print(CLOSED)
        await super().aexit(code)


def _watch_for_closed_output(command: click.Command) -> None:
    """Have a command, and all below it, fail where help is asked for and cannot be printed."""
    command.context_class = _Context
    if isinstance(command, click.Group):
        for each in command.commands.values():
            _watch_for_closed_output(each)


def print_note(line: str) -> None:
    """Print a line on standard error. One that is refused is lost: the exit code tells the rest."""
    with suppress(OSError):
        click.echo(line, err=True)


def one_line(text: str) -> str:
    """`text` with control characters made visible: what is told may hold what others chose."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def end_of_printing(error: OSError) -> tuple[int, PrintFailed | None]:
    """The exit code of a program whose output is refused, and what to say: nothing of a pipe."""
    _discard(sys.stdout)
    if error.errno == errno.EPIPE:
        return BROKEN_PIPE, None
    failed = cannot_print(os.strerror(error.errno or 0))
    return failed.exit_code, failed


def cannot_print(why: str) -> PrintFailed:
    """The error for what is to be printed, and cannot be."""
    return PrintFailed(
        f"cannot print: {why}",
        remedy="see what standard output and standard error lead to; what was done is not undone",
    )


def _give_up_notes() -> None:
    """Let notes vanish that standard error refused: Python would try again, and exit with 120."""
    try:
        if sys.stderr is not None:
            sys.stderr.flush()
    except OSError:
        _discard(sys.stderr)


def _discard(file: TextIO | None) -> None:
    """Let what is still buffered for a standard stream vanish, instead of failing at exit."""
    with suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, file.fileno())  # type: ignore[union-attr]
        os.close(null)


def _is_from_printing(error: OSError) -> bool:
    """Whether click raised it, whose only writing is that to the standard streams."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place is not None and place.tb_frame.f_code.co_filename == click.utils.__file__


def leaves(raised: BaseException) -> Iterator[BaseException]:
    """The exceptions in a group, or the one that is none."""
    if isinstance(raised, BaseExceptionGroup):
        for inner in raised.exceptions:
            yield from leaves(inner)
    else:
        yield raised
