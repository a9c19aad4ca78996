"""The options of `run` for a job's surroundings and identity, collected into fields of `JobSpec`.

`--env`, `--env-file` and `--secret-env` set variables. If a name is set twice, the command line
wins over a file, and a later value over an earlier one. The values of secret variables go to the
server and the job alone: no message here contains one.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import TypeVar

import asyncclick as click

from jobworker.cli.command_line.parameters import (
    Label,
    NonEmptyText,
    User,
    Variable,
    VariableFile,
    VolumePlace,
    one_of_each,
)

F = TypeVar("F", bound=Callable[..., object])

_OPTIONS: tuple[Callable[[F], F], ...] = (
    click.option(
        "--runtime",
        type=NonEmptyText(),
        metavar="NAME",
        help="Run in this root tree of the server, instead of with the server's own programs.",
    ),
    click.option(
        "--volume",
        "-v",
        multiple=True,
        type=VolumePlace(),
        metavar="NAME[:PATH]",
        help="Mount a volume at PATH [default: /volumes/NAME]; may be repeated.",
    ),
    click.option(
        "--network",
        type=click.Choice(["host", "none", "private"]),
        default="host",
        show_default=True,
        help="The server's network; only a loopback; or a private one, outbound only.",
    ),
    click.option(
        "--cpu-cores",
        type=NonEmptyText(),
        metavar="LIST",
        help="Processor cores that the job may use, such as 0-3,5.",
    ),
    click.option(
        "--init",
        is_flag=True,
        help="Start the program below an init, which reaps orphans and forwards signals. Without "
        "it, the program is PID 1 and cannot kill itself: kill -9 $$ does nothing.",
    ),
    click.option(
        "--user", "-u", type=User(), metavar="UID[:GID]", help="User inside the job; 0 is root."
    ),
    click.option(
        "--env",
        "-e",
        multiple=True,
        type=Variable(),
        metavar="NAME=VALUE",
        help="Set a variable; may be repeated.",
    ),
    click.option(
        "--env-file",
        multiple=True,
        type=VariableFile(),
        metavar="FILE",
        help="Set variables from a file of NAME=VALUE lines; may be repeated.",
    ),
    click.option(
        "--secret-env",
        multiple=True,
        type=Variable(from_environment=True),
        metavar="NAME[=VALUE]",
        help="Set a variable that no record shows; without VALUE, use its value here.",
    ),
    click.option(
        "--label",
        "-l",
        multiple=True,
        type=Label(),
        callback=one_of_each,
        metavar="NAME[=VALUE]",
        help="A label to find the job by, empty without VALUE; may be repeated.",
    ),
)
_NAMES = (
    *("runtime", "volume", "network", "init", "cpu_cores", "user"),
    *("env", "env_file", "secret_env", "label"),
)


def job_options(command: Callable[..., object]) -> Callable[..., object]:
    """Add these options to `command`, and pass their values as `fields`: `JobSpec` by name."""

    @wraps(command)
    def gathered(*args: object, **values: object) -> object:
        chosen = {name: values.pop(name) for name in _NAMES}
        return command(*args, fields=_fields(**chosen), **values)  # type: ignore[arg-type]

    for option in reversed(_OPTIONS):
        gathered = option(gathered)
    return gathered


def _fields(  # noqa: PLR0913 - each option is an argument
    *,
    runtime: str | None,
    volume: Sequence[Mapping[str, str]],
    network: str,
    init: bool,
    cpu_cores: str | None,
    user: tuple[int, int | None] | None,
    env: Sequence[tuple[str, str]],
    env_file: Sequence[Sequence[tuple[str, str]]],
    secret_env: Sequence[tuple[str, str]],
    label: Mapping[str, str],
) -> Mapping[str, object]:
    uid, gid = user or (0, None)
    variables = [variable for file in env_file for variable in file]
    return {
        "runtime": runtime,
        "volumes": list(volume),
        "network": network,
        "init": init,
        "cpu_cores": cpu_cores,
        "uid": uid,
        "gid": gid,
        "environment": {**dict(variables), **dict(env)},
        "secret_environment": dict(secret_env),
        "labels": label,
    }
