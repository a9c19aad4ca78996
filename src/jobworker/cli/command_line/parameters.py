"""Types of values on the command line; a value of another form is a usage error."""

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import asyncclick as click

from jobworker.config.default_paths import configuration_in_use, default_configuration
from jobworker.model.job import MAX_ID
from jobworker.model.labels import check_labels
from jobworker.model.units import parse_duration, parse_size
from jobworker.protocol.messages import MAX_OFFSET
from jobworker.regular_file import NotText, decoded

VARIABLE_FILE_BYTES_MAX = 16 << 20
"""A job may have 1 MiB of arguments and variables; the rest is room for comments."""

if TYPE_CHECKING:
    pass


def decode_argument(text: str) -> str:
    """Decode an argument or environment variable as UTF-8, whatever the locale is.

    Python has decoded it by the locale, which may not be UTF-8 (LC_ALL=C). Text that is not UTF-8
    stays as it is. Not for names of local files: Python encodes those back by the locale.
    """
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        return text


class Text(click.ParamType[str]):
    """Text that goes to the server."""

    name = "text"

    def convert(
        self,
        value: object,
        param: click.Parameter | None,  # noqa: ARG002 - see click.ParamType
        ctx: click.Context | None,  # noqa: ARG002
    ) -> str:
        """See click.ParamType."""
        return decode_argument(str(value))


class NonEmptyText(Text):
    """Text that goes to the server and is not empty: "" is most likely an unset variable."""

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> str:
        """See click.ParamType."""
        return super().convert(value, param, ctx) or self.fail(
            "it is empty; give a value, or leave it out", param, ctx
        )


class JobNumber(click.ParamType[int]):
    """A job's id: a positive integer."""

    name = "job"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """See click.ParamType."""
        text = str(value)
        if not re.fullmatch(r"[0-9]{1,19}", text) or not 1 <= int(text) <= MAX_OFFSET:
            self.fail(f"{text!r} is no job's id: an integer from 1 to {MAX_OFFSET}", param, ctx)
        return int(text)


class Count(click.IntRange):
    """A whole number within bounds."""

    name = "integer"  # click would say that 'abc' is no "valid integer range"


class Duration(click.ParamType[float]):
    """Seconds, or numbers with units: 90, 1.5s, 10m, 1h30m."""

    name = "duration"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """See click.ParamType."""
        try:
            return value if isinstance(value, float) else parse_duration(str(value))
        except ValueError as fault:
            self.fail(str(fault), param, ctx)


class Moment(click.ParamType["datetime | timedelta"]):
    """A time (ISO 8601, local without a zone), or a duration before now: 90s, 10m, 1h30m."""

    name = "time"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> datetime | timedelta:
        """See click.ParamType."""
        if isinstance(value, datetime | timedelta):
            return value
        text = str(value)
        with suppress(ValueError):
            return timedelta(seconds=parse_duration(text))
        try:
            return datetime.fromisoformat(text).astimezone(UTC)
        except (ValueError, OverflowError):
            self.fail(
                f"{text!r} is neither a duration (10m) nor a time (2026-01-31T12:00:00)", param, ctx
            )


class Size(click.ParamType[int]):
    """Bytes, or a number with a binary unit: 4096, 500K, 64M, 2G."""

    name = "size"
    _unit, _unit_words = "B", "bytes"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """See click.ParamType."""
        try:
            return parse_size(str(value), alone=self._unit)
        except ValueError as fault:
            self.fail(f"{fault}; a number alone is {self._unit_words}", param, ctx)


class Megabytes(Size):
    """A number with a binary unit; a number without one counts units of 2^20 bytes."""

    _unit, _unit_words = "M", "MB"


class Percent(click.ParamType[int]):
    """A whole number of percent, with or without the percent sign: 50, 200%."""

    name = "percent"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """See click.ParamType."""
        found = re.fullmatch(r"(-?[0-9]{1,12})%?", str(value))
        if found is None:
            fault = f"{str(value)!r} is not a whole number of percent; half a core is 50"
            self.fail(fault, param, ctx)
        return int(found[1])


class Variable(click.ParamType[tuple[str, str]]):
    """NAME=VALUE; the value may contain anything, also equal signs.

    `from_environment`: NAME alone takes the value of this program's own variable NAME.
    """

    name = "variable"

    def __init__(self, *, from_environment: bool = False) -> None:
        self._from_environment = from_environment

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        """See click.ParamType."""
        if isinstance(value, tuple):
            return str(value[0]), str(value[1])
        name, equals, content = decode_argument(str(value)).partition("=")
        if equals:
            return name, content
        if not self._from_environment:
            self.fail(f"{name!r} is not NAME=VALUE", param, ctx)
        if name not in os.environ:
            self.fail(f"the variable {name!r} is not set here; give it as NAME=VALUE", param, ctx)
        return name, decode_argument(os.environ[name])


class VolumePlace(click.ParamType[dict[str, str]]):
    """NAME or NAME:PATH, as the fields of a `VolumeMount`."""

    name = "volume"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> dict[str, str]:
        """See click.ParamType."""
        if isinstance(value, dict):
            return value
        text = decode_argument(str(value))
        name, colon, path = text.partition(":")
        if colon and not path:
            self.fail(f"{text!r} is not NAME or NAME:PATH", param, ctx)
        if name.startswith(("/", ".", "~")):
            self.fail(
                f"{name!r} is no volume's name, and directories of the host are never mounted; "
                "make a volume: worker-cli volume create",
                param,
                ctx,
            )
        if ":" in path:  # Docker's NAME:PATH:ro would become a writable mount here
            self.fail(
                f"{text!r} has a second ':'; there is no read-only mount, and a path may not "
                "contain ':'",
                param,
                ctx,
            )
        return {"name": name, "path": path}


class VariableFile(click.ParamType[tuple[tuple[str, str], ...]]):
    """A file of NAME=VALUE lines, without quoting; empty lines and lines with # are skipped.

    NAME alone takes the value of this program's own variable NAME, if it is set.
    """

    name = "file"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[tuple[str, str], ...]:
        """See click.ParamType."""
        if isinstance(value, tuple):
            return value
        try:
            with open(os.path.expanduser(str(value)), "rb") as file:  # a pipe is welcome
                given = file.read(VARIABLE_FILE_BYTES_MAX + 1)
            if len(given) > VARIABLE_FILE_BYTES_MAX:
                raise NotText(f"it is larger than {VARIABLE_FILE_BYTES_MAX} bytes")
            lines = decoded(given).split("\n")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            self.fail(f"cannot read {str(value)!r}: {reason}", param, ctx)
        found = []
        for number, line in enumerate(lines, 1):
            name, equals, content = line.removesuffix("\r").lstrip().partition("=")
            if not name.strip() and equals:
                self.fail(f"line {number} of {str(value)!r} has no name", param, ctx)
            if not name.strip() or name.startswith("#"):
                continue
            if equals:
                found.append((name, content))
            elif (here := os.environ.get(name.strip())) is not None:
                found.append((name.strip(), here))
        return tuple(found)


class Label(click.ParamType[tuple[str, str]]):
    """NAME=VALUE, or NAME for an empty value."""

    name = "label"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        """See click.ParamType."""
        name, _, content = (
            value if isinstance(value, tuple) else decode_argument(str(value)).partition("=")
        )
        try:
            check_labels(None, None, {name: content})
        except ValueError as fault:
            self.fail(str(fault), param, ctx)
        return name, content


class LabelFilter(Label):
    """NAME=VALUE: the server compares both, so NAME alone would only match an empty value."""

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        """See click.ParamType."""
        if isinstance(value, str) and "=" not in value:
            self.fail(
                f"{value!r} is not NAME=VALUE: jobs are found by a label's name and value; "
                "NAME= finds those without a value",
                param,
                ctx,
            )
        return super().convert(value, param, ctx)


def one_of_each(
    ctx: click.Context, param: click.Parameter, pairs: Sequence[tuple[str, str]]
) -> dict[str, str]:
    """Join the labels of a new job in a dict; a callback of click.

    Raises click.BadParameter for two values of one label.
    """
    return _together(
        pairs, "a label has one value, not both {0} and {1}: leave one out", ctx, param
    )


def all_sought(
    ctx: click.Context, param: click.Parameter, pairs: Sequence[tuple[str, str]]
) -> dict[str, str]:
    """Join the labels of a search, all of which a job must have, in a dict; a callback of click.

    Raises click.BadParameter for two values of one label: no job has both.
    """
    return _together(pairs, "no job has both {0} and {1}: ask for one of them", ctx, param)


def _together(
    pairs: Sequence[tuple[str, str]], fault: str, ctx: click.Context, param: click.Parameter
) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, content in pairs:
        if found.setdefault(name, content) != content:
            both = f"{name}={found[name]}", f"{name}={content}"
            raise click.BadParameter(fault.format(*both), ctx, param)
    return found


class User(click.ParamType[tuple[int, int | None]]):
    """UID or UID:GID, numeric ids inside the job."""

    name = "user"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int | None]:
        """See click.ParamType."""
        found = re.fullmatch(r"([0-9]{1,9})(?::([0-9]{1,9}))?", str(value))
        if found is None:
            self.fail(f"{str(value)!r} is not UID or UID:GID, in numbers", param, ctx)
        numbers = [int(number) for number in found.groups() if number is not None]
        if max(numbers) > MAX_ID:
            self.fail(f"{max(numbers)} is beyond {MAX_ID}, the last id inside a job", param, ctx)
        return numbers[0], numbers[1] if len(numbers) > 1 else None


def config_option(command: "click.decorators.FC") -> "click.decorators.FC":
    """Add `--config`, the service's configuration file, to a command of `worker`."""
    return click.option(
        "--config",
        type=click.Path(path_type=Path),
        default=configuration_in_use,
        help=f"Configuration file [default: {default_configuration()} if it exists].",
    )(command)


def prune_options(command: "click.decorators.FC") -> "click.decorators.FC":
    """Add the options that select the output that `prune` removes."""
    for option in (
        click.option(
            "--max-size",
            type=Size(),
            metavar="SIZE",
            help="Remove until the rest fits this size: 500M, 10G; a number alone is bytes.",
        ),
        click.option(
            "--keep", type=Count(0), metavar="N", help="Remove all but that of the last N jobs."
        ),
        click.option(
            "--older-than", type=Duration(), help="Remove that of jobs ended longer ago: 12h, 30d."
        ),
    ):
        command = option(command)
    return command
