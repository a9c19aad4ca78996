"""Summaries: records of bounded size, for whatever is told often or of many jobs.

A job may have a megabyte of arguments and variables. A list of a thousand such jobs, or a thousand
followers that are told of one end, would multiply it. So lists and ends carry a summary, in which
variables are left out and what else is long is cut; `abridged` names those parts. Whoever wants
them asks for the one job (`job.status`). Pure.
"""

from collections.abc import Mapping

from attrs import evolve

from jobworker.model.job import MAX_DETAIL, JobRecord, JobSpec, Part
from jobworker.model.made import altered
from jobworker.model.volumes import VolumeMount

MAX_COMMAND = 2048
"""Characters of a command in a summary, with one between two arguments: some screen lines."""
MAX_WORKDIR = 1024
MAX_LABELS = 1024
"""Characters of all names and values of labels together."""
MAX_VOLUMES = 1024
"""Characters of all names and places of volumes together."""
MAX_KEPT = 4096
"""Characters of a request that stay in memory while its job lives: a thousand may wait."""
_CUT = "…"


def summarize(record: JobRecord) -> JobRecord:
    """The summary of a record; a summary is its own."""
    changes = _changes(record.spec)
    if changes:
        parts = tuple(sorted({*record.abridged, *changes}))
        record = evolve(record, spec=altered(record.spec, **changes), abridged=parts)
    detail = _sound_detail(record.detail)
    return record if detail is record.detail else evolve(record, detail=detail)


def _sound_detail(detail: str) -> str:
    """What was said of an end, bounded, and as text that any disk and wire take."""
    if len(detail) > MAX_DETAIL:
        detail = detail[: MAX_DETAIL - 1] + _CUT
    try:
        detail.encode()
    except UnicodeEncodeError:  # it quotes the name of a file that is none
        return detail.encode(errors="backslashreplace").decode()[:MAX_DETAIL]
    return detail


def without_bulk(record: JobRecord) -> JobRecord:
    """The record as it is kept in memory for as long as a job lives: its bulk is on the disk.

    A request of a megabyte takes five in memory. Labels stay, by which jobs are searched.
    """
    if not _is_large(record.spec):
        return record
    changes = _changes(record.spec)
    changes.pop("labels", None)
    parts = tuple(sorted({*record.abridged, *changes}))
    return evolve(record, spec=altered(record.spec, **changes), abridged=parts)


def with_labels(summary: JobRecord, labels: Mapping[str, str]) -> JobRecord:
    """The summary with all of its job's labels."""
    parts = tuple(part for part in summary.abridged if part != "labels")
    return evolve(summary, spec=altered(summary.spec, labels=labels), abridged=parts)


def _is_large(spec: JobSpec) -> bool:
    """Whether what may be long has more characters than is kept."""
    variables_in_all = len(spec.environment) + len(spec.secret_environment)
    if len(spec.command) + variables_in_all > MAX_KEPT:
        return True  # each has one at least
    size = sum(map(len, spec.command)) + len(spec.command) + len(spec.workdir)
    for variables in (spec.environment, spec.secret_environment):
        size += sum(map(len, variables)) + sum(map(len, variables.values())) + len(variables)
    size += sum(len(mount.name) + len(mount.path) for mount in spec.volumes)
    return size > MAX_KEPT


def whole(summary: JobRecord, spec: JobSpec) -> JobRecord:
    """The record that has been summarized, with the request that was made."""
    return evolve(summary, spec=spec, abridged=())


def _changes(spec: JobSpec) -> dict[Part, object]:
    """What a summary shows instead of long parts of a request, by part."""
    changes: dict[Part, object] = {}
    if spec.environment:
        changes["environment"] = {}
    if spec.secret_environment:
        changes["secret_environment"] = {}
    command = short_command(spec.command)
    if command is not spec.command:
        changes["command"] = command
    if len(spec.workdir) > MAX_WORKDIR:
        changes["workdir"] = spec.workdir[: MAX_WORKDIR - 1] + _CUT
    labels = _first_labels(spec.labels)
    if len(labels) < len(spec.labels):
        changes["labels"] = labels
    volumes = _first_volumes(spec.volumes)
    if len(volumes) < len(spec.volumes):
        changes["volumes"] = volumes
    return changes


def short_command(command: tuple[str, ...]) -> tuple[str, ...]:
    """The command itself, or its first arguments, the last one cut to end with an ellipsis."""
    size = 0
    for argument in command:
        size += len(argument) + 1
        if size > MAX_COMMAND:
            return _cut_command(command)
    return command


def _cut_command(command: tuple[str, ...]) -> tuple[str, ...]:
    kept, room = list[str](), MAX_COMMAND - 2
    for argument in command:
        if len(argument) >= room:
            kept.append(argument[:room] + _CUT)
            break
        kept.append(argument)
        room -= len(argument) + 1
    return tuple(kept)


def _first_labels(labels: Mapping[str, str]) -> Mapping[str, str]:
    kept, room = dict[str, str](), MAX_LABELS
    for name, value in labels.items():
        room -= len(name) + len(value)
        if room < 0:
            break
        kept[name] = value
    return kept


def _first_volumes(volumes: tuple[VolumeMount, ...]) -> tuple[VolumeMount, ...]:
    kept, room = list[VolumeMount](), MAX_VOLUMES
    for mount in volumes:
        room -= len(mount.name) + len(mount.path)
        if room < 0:
            break
        kept.append(mount)
    return tuple(kept)
