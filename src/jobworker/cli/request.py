"""A job as the options of `run` ask for it, and faults in the words of those options.

Bounds stand with `JobSpec` alone; what they say of `limits.cpu_percent` is told of `--max-cpu`.
"""

import re

from jobworker.convert import faults_of
from jobworker.errors import InvalidParams
from jobworker.model.job import MAX_MEMORY_BYTES, MIN_MEMORY_BYTES, JobSpec

MEBIBYTE = 1 << 20

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
_PATH = re.compile(r"\b(?:job\.)?(" + "|".join(map(re.escape, _OPTIONS)) + r")(?=[:\[])")
_COMMAND = re.compile(r"(?<!the )\b(?:job\.)?command(?:\[(\d+)\])?: (?!argument)")
_ARGUMENT = re.compile(r"(?<!the )\b(?:job\.)?command: (?=argument)")
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
    spec, faults = faults_of(
        JobSpec,
        {
            "command": list(command),
            "limits": {key: value for key, value in limits.items() if value is not None},
            **{key: value for key, value in fields.items() if value is not None},
        },
    )
    if faults or spec is None:
        told = [_memory_fault(fault, limits.get("memory_bytes")) for fault in faults]
        raise InvalidParams("cannot run the command: " + "; ".join(map(in_options, told)))
    spec.check_size()
    return spec


def in_options(message: str) -> str:
    """`message` with the paths of values replaced by the options that give them."""
    message = _PATH.sub(lambda found: _OPTIONS[found[1]], message)
    message = _ARGUMENT.sub("", message)
    message = _COMMAND.sub(
        lambda found: "the command " if found[1] is None else f"argument {found[1]} ", message
    )
    message = re.sub(r"(--env|--secret-env|--label)\['([^']*)'\]: ", r"\1 \2 ", message)
    return message.replace(_SURROGATE, "is not UTF-8 text")


def _memory_fault(fault: str, asked_bytes: int | None) -> str:
    if asked_bytes is None or not fault.startswith("limits.memory_bytes:"):
        return fault
    low, high = MIN_MEMORY_BYTES // MEBIBYTE, MAX_MEMORY_BYTES // MEBIBYTE
    asked = asked_bytes // MEBIBYTE
    return f"limits.memory_bytes: must be 0 (no limit) or from {low} to {high} MB, not {asked}"
