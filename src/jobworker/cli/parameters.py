"""Kinds of values on the command line; what is no such value is a usage error."""

import re
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import asyncclick as click

from jobworker.cli.options import Invocation
from jobworker.model.units import parse_duration
from jobworker.protocol.messages import MAX_OFFSET

if TYPE_CHECKING:
    from collections.abc import Callable


class JobNumber(click.ParamType[int]):
    """A job's id: a positive integer."""

    name = "job"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """See click.ParamType."""
        text = str(value)
        if not re.fullmatch(r"[0-9]{1,19}", text) or not 1 <= int(text) <= MAX_OFFSET:
            self.fail(f"{text!r} is no job's id: ids are positive integers", param, ctx)
        return int(text)


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
    """A time (ISO 8601, local where it names no zone), or how long ago: 90s, 10m, 1h30m."""

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


class Variable(click.ParamType[tuple[str, str]]):
    """NAME=VALUE; the value may hold anything, further equal signs too."""

    name = "variable"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        """See click.ParamType."""
        if isinstance(value, tuple):
            return str(value[0]), str(value[1])
        name, equals, content = str(value).partition("=")
        if not equals:
            self.fail(f"{str(value)!r} is not NAME=VALUE", param, ctx)
        return name, content


pass_invocation = click.make_pass_decorator(Invocation, ensure=True)


def _ask_for_json(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.ensure_object(Invocation).json = True


def json_option() -> "Callable[[click.decorators.FC], click.decorators.FC]":
    """`--json`, before a command or among its options."""
    return click.option(
        "--json",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_ask_for_json,
        help="Print JSON for programs instead of text for people.",
    )
