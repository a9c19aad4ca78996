"""Render jobs as text for people and as JSON for programs. Pure: records in, strings out.

Text that a job or another user chose (commands, names, details) may contain control characters,
which a terminal would obey, or bidirectional marks, which change how a line reads. All such text
goes through `visible`. A job's output does not come here; `console` prints it.
"""

import shlex
import signal
from collections.abc import Sequence
from datetime import UTC, datetime

from jobworker.cli.command_line.failures import one_line as visible
from jobworker.errors import JobworkerError
from jobworker.model.job import (
    KILLED_FOR_MEMORY,
    LOSSES_UNKNOWN,
    LOST_WRITES,
    SERVICE_ENDED,
    JobRecord,
    JobSpec,
    JobStatus,
    OutputCut,
    Usage,
)
from jobworker.model.lifecycle import Reason, State
from jobworker.model.units import format_duration, format_limit, format_size
from jobworker.serialization.convert import unstructure
from jobworker.serialization.json_text import dumps

MAX_TABLE_COMMAND = 200
"""Characters of a command line in a table without a terminal, whose width would be the bound."""

_COLOURS = {
    State.PENDING: "33",
    State.INITIALIZING: "33",
    State.RUNNING: "32",
    State.COMPLETED: "2",
    State.FAILED: "31",
    State.STOPPED: "2",
}


def as_json(record: JobRecord) -> str:
    """Render a record as one line of JSON, as on the wire."""
    return dumps(unstructure(record))


def error_as_json(error: JobworkerError) -> str:
    """Render an error as one line of JSON: its members on the wire, and the exit code."""
    return dumps(
        {
            "error": {
                "code": error.code,
                "name": error.name,
                "message": error.message,
                "remedy": error.remedy,
                "exit_code": error.exit_code,
                "data": error.data,
            }
        }
    )


def timestamp(moment: datetime | None) -> str:
    """Format a time as RFC 3339, in UTC, to the second; "-" for None."""
    if moment is None:
        return "-"
    return moment.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def command_line(record: JobRecord) -> str:
    """The command, quoted for a shell, on one line."""
    return visible(shlex.join(record.spec.command))


def short_command(record: JobRecord) -> str:
    """The beginning of the command line, for a table."""
    line = command_line(record)
    return line if len(line) <= MAX_TABLE_COMMAND else line[: MAX_TABLE_COMMAND - 1] + "…"


def state_words(record: JobRecord) -> str:
    """The state with its reason, such as "RUNNING", "FAILED (oom)", "STOPPED (service ended)"."""
    if _ended_with_service(record):
        return f"{record.state.value} (service ended)"
    if record.reason is None:
        return record.state.value
    if record.reason is Reason.EXIT and record.exit_code is not None:
        return f"{record.state.value} (exit {record.exit_code})"
    return f"{record.state.value} ({record.reason.value})"


def started(record: JobRecord) -> str:
    """The lines that `run` prints about a started job."""
    return "\n".join(
        [
            "Job started:",
            f"ID: {record.id}",
            f"Command: {command_line(record)}",
            f"Status: {record.state.value}",
            f"StartTime: {timestamp(record.started_at)}",
            f"Network: {record.spec.network}",
        ]
    )


def outcome(record: JobRecord) -> str:
    """One line about a job, as `wait` and `stop` print it."""
    return f"job {record.id}: {state_words(record)}"


def ending(record: JobRecord) -> list[str]:
    """Lines about a job's end that the job's output and exit code do not show."""
    why = _why_ended(record)
    lines = [visible(f"job {record.id} {why}")] if why else []
    facts = (LOST_WRITES, LOSSES_UNKNOWN, KILLED_FOR_MEMORY)
    grave = [words for words in facts if words in record.detail]
    if any(words not in why for words in grave):
        lines.append(visible(f"job {record.id}: {record.detail}"))
    return [*lines, *_not_kept(record)]


def losses(record: JobRecord) -> list[str]:
    """Lines about output that is or may be lost, and about an end that cut the output short."""
    lines = []
    if record.reason is Reason.LOST:
        lost = f"job {record.id} {_why_ended(record)}; the end of its output may be missing"
        lines.append(visible(lost))
    if _ended_with_service(record):
        lines.append(f"job {record.id} {_why_ended(record)}")
    return [*lines, *_not_kept(record)]


def _ended_with_service(record: JobRecord) -> bool:
    """Whether the end of the service stopped the job."""
    return record.state is State.STOPPED and SERVICE_ENDED in record.detail


def _not_kept(record: JobRecord) -> list[str]:
    if not (record.discarded_bytes or record.output_cut):
        return []
    lost = format_size(record.discarded_bytes)
    why = f": {_why_cut(record)}" if record.output_cut else ""
    return [f"job {record.id}: {lost} of its output were not kept{why}"]


def _why_cut(record: JobRecord) -> str:
    """The reason why output was not kept, as far as it is known."""
    limit = record.spec.limits.output_bytes
    words = {
        OutputCut.LIMIT: "it reached its limit on output"
        + (f" of {format_limit(limit)}" if limit else ""),
        OutputCut.TOTAL: "all jobs' output together reached the server's limit",
        OutputCut.DISK: "the server's disk is full, or refused to write",
    }
    return words[record.output_cut] if record.output_cut else "its output could not be kept"


def _why_ended(record: JobRecord) -> str:
    detail = f": {record.detail}" if record.detail else ""
    longest = format_duration(record.spec.timeout_seconds or 0)
    words = {
        Reason.OOM: f"was ended: {_why_out_of_memory(record)}",
        Reason.TIMEOUT: f"was ended: it ran longer than its time limit of {longest}",
        Reason.OUTPUT: f"was stopped: {_why_cut(record)}",
        Reason.SIGNAL: f"was ended by {_signal(record.signal)}{detail}",
        Reason.DISK: f"ended with code 0, but cannot be trusted{detail}",
        Reason.START: f"could not be started{detail}",
        Reason.LOST: f"was lost{detail or ': its launcher ended while it ran'}",
    }
    if record.state is State.STOPPED:
        return "was stopped" + (f": {SERVICE_ENDED}" if _ended_with_service(record) else "")
    return "" if record.reason is None else words.get(record.reason, "")


def _why_out_of_memory(record: JobRecord) -> str:
    for words in record.detail.split("; "):
        if KILLED_FOR_MEMORY in words:
            return words
    limit = record.spec.limits.memory_bytes
    if limit == 0:  # the record is from a release that recorded no detail
        return f"it was {KILLED_FOR_MEMORY}"
    return "it went over its memory limit" + (f" of {format_limit(limit)}" if limit else "")


def _signal(number: int | None) -> str:
    try:
        return f"signal {number} ({signal.Signals(number or 0).name})"
    except ValueError:
        return f"signal {number}"


def _limit(value: int | None, words: str) -> str:
    if value is None:
        return "the server's limit"
    return f"limit {words}" if value else "no limit"


def status(record: JobStatus, now: datetime) -> str:
    """Render all of a job's record, one line for each item; `now` gives a live job's age."""
    spec, limits = record.spec, record.spec.limits
    usage = record.usage or Usage()
    unmeasured = record.usage is None and record.ended and record.started_at is not None
    lines = [("ID", str(record.id)), ("Name", spec.name), ("Command", command_line(record))]
    lines += [("Owner", record.owner), ("Status", state_words(record)), ("Detail", record.detail)]
    if record.exit_code is not None:
        lines.append(("Exit code", str(record.exit_code)))
    if record.signal is not None:
        lines.append(("Signal", _signal(record.signal).removeprefix("signal ")))
    lines += [
        ("Created", timestamp(record.created_at)),
        ("Started", timestamp(record.started_at)),
        ("Ended", timestamp(record.ended_at)),
        ("Duration", _duration(record, now)),
        ("Timeout", _timeout(spec.timeout_seconds)),
        ("Usage", "not measured" if unmeasured else ""),
        ("CPU", f"{_cpu(usage)}, {_limit(limits.cpu_percent, f'{limits.cpu_percent}%')}"),
        ("Cores", spec.cpu_cores),
        ("Memory", ", ".join([*_memory(record, usage), _memory_limit(record)])),
        ("IO", f"{_io(usage)}, {_limit(limits.io_bps, f'{format_limit(limits.io_bps or 0)}/s')}"),
        ("Disk", "" if limits.disk_bytes is None else f"limit {format_limit(limits.disk_bytes)}"),
        ("Processes", _processes(record, usage)),
        ("Output", _output(record)),
        ("Workdir", spec.workdir),
        ("User", "" if spec.gid is None and not spec.uid else _user(spec)),
        ("Init", "yes" if spec.init else ""),
        ("Labels", ", ".join(f"{name}={value}" for name, value in spec.labels.items())),
        ("Secrets", ", ".join(spec.secret_environment)),
        ("Network", spec.network),
        ("Runtime", spec.runtime),
        ("Volumes", ", ".join(f"{mount.name} at {mount.place}" for mount in spec.volumes)),
        *(("Warning", text) for text in record.warnings),
    ]
    return "\n".join(f"{label}: {visible(text)}" for label, text in lines if text)


def _duration(record: JobRecord, now: datetime) -> str:
    if record.started_at is None:
        return "-"
    end = record.ended_at or now
    return format_duration(max(0.0, (end - record.started_at).total_seconds()))


def _user(spec: JobSpec) -> str:
    return str(spec.uid) if spec.gid is None else f"{spec.uid}:{spec.gid}"


def _timeout(seconds: float | None) -> str:
    if seconds is None:
        return "the server's limit"
    return format_duration(seconds) if seconds else "no limit"


def _cpu(usage: Usage) -> str:
    words = f"{usage.cpu_ns / 1e9:.1f}s used"
    if usage.throttled_ns >= 50_000_000:  # less would be rounded to 0.0 s
        words += f", {usage.throttled_ns / 1e9:.1f}s held back"
    return words


def _memory(record: JobRecord, usage: Usage) -> list[str]:
    peak = f"{format_size(usage.memory_peak_bytes)} peak"
    return [peak] if record.ended else [f"{format_size(usage.memory_bytes)} now", peak]


def _memory_limit(record: JobRecord) -> str:
    count = record.spec.limits.memory_bytes
    return _limit(count, format_limit(count or 0))


def _io(usage: Usage) -> str:
    return f"{format_size(usage.read_bytes)} read, {format_size(usage.write_bytes)} written"


def _processes(record: JobRecord, usage: Usage) -> str:
    limit = _limit(record.spec.limits.processes, str(record.spec.limits.processes))
    return limit if record.ended else f"{usage.processes} now, {limit}"


def _output(record: JobRecord) -> str:
    words = f"{format_size(record.stdout_bytes)} stdout, {format_size(record.stderr_bytes)} stderr"
    if record.discarded_bytes:
        words += f", {format_size(record.discarded_bytes)} not kept"
    if record.output_cut:
        words += f" ({_why_cut(record)})"
    if record.output_removed_at:
        words += f", removed {timestamp(record.output_removed_at)}"
    limit = record.spec.limits.output_bytes
    return f"{words}, {_limit(limit, format_limit(limit or 0))}"


def table(
    records: Sequence[JobRecord], now: datetime, *, width: int | None = None, colour: bool = False
) -> str:
    """Render jobs as an aligned table; `width` cuts lines at so many columns."""
    rows = [("ID", "STATUS", "CREATED", "DURATION", "COMMAND")]
    for record in records:
        label = f"{visible(record.spec.name)}: " if record.spec.name else ""
        rows.append(
            (
                str(record.id),
                state_words(record),
                timestamp(record.created_at),
                _duration(record, now),
                label + short_command(record),
            )
        )
    sizes = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = []
    for number, row in enumerate(rows):
        cells = [cell.ljust(size) for cell, size in zip(row, sizes, strict=False)]
        line = "  ".join([*cells, row[4]])
        if width is not None and len(line) > width:
            line = line[: max(width - 1, 0)] + "…"
        if colour and number:
            # Colour the column by position, after the cut, so that the reset is never cut off.
            begin, end = sizes[0] + 2, sizes[0] + 2 + sizes[1]
            code = _COLOURS[records[number - 1].state]
            line = f"{line[:begin]}\x1b[{code}m{line[begin:end]}\x1b[0m{line[end:]}"
        lines.append(line.rstrip())
    return "\n".join(lines)
