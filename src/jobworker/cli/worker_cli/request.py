"""Make a `JobSpec` from the options of `run`, and name these options in its faults.

`JobSpec` alone states the bounds. A fault at `limits.cpu_percent` becomes one of `--max-cpu`.
"""

import re

from jobworker.errors import InvalidParams
from jobworker.model.job import JobSpec
from jobworker.model.units import format_limit
from jobworker.serialization.convert import structure

_OPTIONS = {
    "limits.cpu_percent": "--max-cpu",
    "limits.memory_bytes": "--max-memory",
    "limits.io_bps": "--max-iobps",
    "limits.processes": "--max-pids",
    "limits.output_bytes": "--max-output",
    "limits.disk_bytes": "--max-disk",
    "runtime": "--runtime",
    "volumes": "--volume",
    "at_max_output": "--at-max-output",
    "timeout_seconds": "--timeout",
    "environment": "--env",
    "secret_environment": "--secret-env",
    "network": "--network",
    "cpu_cores": "--cpu-cores",
    "init": "--init",
    "uid": "--user",
    "gid": "--user",
    "labels": "--label",
    "workdir": "--workdir",
    "name": "--name",
}
_SIZES = frozenset(
    {"limits.memory_bytes", "limits.disk_bytes", "limits.output_bytes", "limits.io_bps"}
)
"""Fields in bytes, whose options take a unit."""
_BOUNDS = re.compile(r"(?P<words>must be .*?)from (\d+) to (\d+), not (-?\d+)")
"""Matches the messages of `model.bounds.within`."""
_NO_TEXT = "is not UTF-8 text"
_SURROGATE = "must be Unicode text: it holds a lone surrogate"


def make_spec(
    command: tuple[str, ...],
    *,
    limits: dict[str, int | None],
    **fields: object,
) -> JobSpec:
    """Make the request and check it. Raises InvalidParams and TooLarge.

    `limits` has the fields of `Limits` by name, `fields` those of `JobSpec`; None for an option
    that was not given.
    """
    try:
        spec = structure(
            JobSpec,
            {
                "command": list(command),
                "limits": {key: value for key, value in limits.items() if value is not None},
                **{key: value for key, value in fields.items() if value is not None},
            },
        )
    except InvalidParams as error:
        raise in_options(error) from None
    spec.check_size()
    return spec


def in_options(error: InvalidParams) -> InvalidParams:
    """Return the error with options in place of the paths of `data["faults"]`.

    An error without faults is returned unchanged, and the values that a fault quotes stay too.
    """
    faults = error.data.get("faults")
    if not isinstance(faults, list) or not faults:
        return error
    problems = [
        _format_fault(str(fault.get("path")).removeprefix("job."), str(fault.get("problem")))
        for fault in faults
        if isinstance(fault, dict)
    ]
    message = "cannot run the command: " + "; ".join(problems)
    remedy = error.remedy
    if not remedy and any(words.endswith(_NO_TEXT) for words in problems):
        remedy = "convert it to UTF-8; encode bytes that are not text, for example as base64"
    return InvalidParams(message, remedy=remedy, data=error.data)


def _format_fault(path: str, problem: str) -> str:
    """Format a fault: the option, or the argument of the command, and what is wrong with it."""
    if problem == _SURROGATE:
        problem = _NO_TEXT
    if path in _SIZES:
        problem = _with_units(problem)
    if found := re.fullmatch(r"command\[(\d+)\]", path):
        return f"argument {found[1]} {problem}"
    if path == "command":
        return problem if problem.startswith("argument ") else f"the command {problem}"
    for place, option in _OPTIONS.items():
        if path == place:
            return f"{option}: {problem}"
        if found := re.fullmatch(re.escape(place) + r"\['(.*)'\]", path):
            return f"{option} {found[1]} {problem}"
        if path.startswith((f"{place}[", f"{place}.")):
            return f"{option}: {problem}"
    return f"{path}: {problem}" if path else problem


def _with_units(problem: str) -> str:
    """Write the numbers of bytes in a fault as sizes with units."""

    def with_units(found: re.Match[str]) -> str:
        low, high, asked = (format_limit(int(number)) for number in found.groups()[1:])
        return f"{found['words']}from {low} to {high}, not {asked}"

    return _BOUNDS.sub(with_units, problem)
