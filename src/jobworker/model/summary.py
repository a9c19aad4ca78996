"""Summaries: records of bounded size, for messages that are frequent or contain many jobs.

A job may have a megabyte of arguments and variables. A list of a thousand such jobs, or the end of
one job sent to a thousand followers, would multiply that. So lists and ends carry summaries: they
leave out variables and cut other long parts, and `abridged` names these parts. A client gets all
parts of one job by `job.status`. Pure.
"""

from collections.abc import Mapping

from attrs import evolve

from jobworker.model.checked_classes import evolve_unchecked
from jobworker.model.job import MAX_DETAIL, JobRecord, JobSpec, Part
from jobworker.model.volumes import VolumeMount

MAX_COMMAND = 2048
"""Characters of a command in a summary, plus one between two arguments: some lines of a screen."""
MAX_WORKDIR = 1024
MAX_LABELS = 1024
"""Characters of all names and values of labels together."""
MAX_VOLUMES = 1024
"""Characters of all names and paths of volumes together."""
MAX_KEPT = 4096
"""Characters of a request that stay in memory while its job lives: a thousand jobs may wait."""
_CUT = "…"


def summarize(record: JobRecord) -> JobRecord:
    """Return the summary of a record. Idempotent."""
    changes = _changes(record.spec)
    if changes:
        parts = tuple(sorted({*record.abridged, *changes}))
        record = evolve(record, spec=evolve_unchecked(record.spec, **changes), abridged=parts)
    detail = _sound_detail(record.detail)
    return record if detail is record.detail else evolve(record, detail=detail)


def _sound_detail(detail: str) -> str:
    """Cut the detail of an end to `MAX_DETAIL` characters, and make it valid UTF-8 text."""
    if len(detail) > MAX_DETAIL:
        detail = detail[: MAX_DETAIL - 1] + _CUT
    try:
        detail.encode()
    except UnicodeEncodeError:  # it quotes a file name that is not UTF-8
        return detail.encode(errors="backslashreplace").decode()[:MAX_DETAIL]
    return detail


def without_bulk(record: JobRecord) -> JobRecord:
    """Return the record that stays in memory while a job lives, without a large request's bulk.

    The whole request is on disk, and a megabyte of it would take five in memory. Labels stay,
    because searches read them.
    """
    if not _is_large(record.spec):
        return record
    changes = _changes(record.spec)
    changes.pop("labels", None)
    parts = tuple(sorted({*record.abridged, *changes}))
    return evolve(record, spec=evolve_unchecked(record.spec, **changes), abridged=parts)


def with_labels(summary: JobRecord, labels: Mapping[str, str]) -> JobRecord:
    """Return the summary with all labels of its job."""
    parts = tuple(part for part in summary.abridged if part != "labels")
    return evolve(summary, spec=evolve_unchecked(summary.spec, labels=labels), abridged=parts)


def _is_large(spec: JobSpec) -> bool:
    """Whether the long parts of a request have more than `MAX_KEPT` characters together."""
    variables_in_all = len(spec.environment) + len(spec.secret_environment)
    if len(spec.command) + variables_in_all > MAX_KEPT:
        return True  # each counts at least one character
    size = sum(map(len, spec.command)) + len(spec.command) + len(spec.workdir)
    for variables in (spec.environment, spec.secret_environment):
        size += sum(map(len, variables)) + sum(map(len, variables.values())) + len(variables)
    size += sum(len(mount.name) + len(mount.path) for mount in spec.volumes)
    return size > MAX_KEPT


def whole(summary: JobRecord, spec: JobSpec) -> JobRecord:
    """Return the record of a summary with its whole request."""
    return evolve(summary, spec=spec, abridged=())


def _changes(spec: JobSpec) -> dict[Part, object]:
    """The shorter values that a summary has instead of long parts of a request, by part."""
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
    """Return a short command itself, or the first arguments of a long one, ending with "…"."""
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
