"""A job as the options of `run` ask for it, and faults in the words of those options.

Bounds stand with `JobSpec` alone; what they say of `limits.cpu_percent` is told of `--max-cpu`.
"""

import re

from jobworker.convert import structure
from jobworker.errors import InvalidParams
from jobworker.model.job import JobSpec
from jobworker.model.units import format_limit

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
"""What is asked for with a unit and counted in bytes."""
_BOUNDS = re.compile(r"(?P<words>must be .*?)from (\d+) to (\d+), not (-?\d+)")
"""As `model.bounds.within` puts it."""
_NO_TEXT = "is not UTF-8 text"
_SURROGATE = "must be Unicode text: it holds a lone surrogate"


def make_spec(
    command: tuple[str, ...],
    *,
    limits: dict[str, int | None],
    **fields: object,
) -> JobSpec:
    """The request, checked. Raises InvalidParams and TooLarge.

    `limits` are those of `Limits` by name, `fields` those of `JobSpec`; None where an option was
    not given.
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
    """The error about a request, with the options in place of the paths of `data["faults"]`.

    One without faults stays as it is. Values are the user's own words, and are not touched.
    """
    faults = error.data.get("faults")
    if not isinstance(faults, list) or not faults:
        return error
    told = [
        _told(str(fault.get("path")).removeprefix("job."), str(fault.get("problem")))
        for fault in faults
        if isinstance(fault, dict)
    ]
    message = "cannot run the command: " + "; ".join(told)
    remedy = error.remedy
    if not remedy and any(words.endswith(_NO_TEXT) for words in told):
        remedy = "convert it to UTF-8; bytes that are no text may go encoded, as base64 say"
    return InvalidParams(message, remedy=remedy, data=error.data)


def _told(path: str, problem: str) -> str:
    """A fault in words: the option, or the argument of the command, and what is wrong with it."""
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
    """A fault of a number of bytes, told as sizes are."""

    def told(found: re.Match[str]) -> str:
        low, high, asked = (format_limit(int(number)) for number in found.groups()[1:])
        return f"{found['words']}from {low} to {high}, not {asked}"

    return _BOUNDS.sub(told, problem)
