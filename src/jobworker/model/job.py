"""The data of a job: its request, its limits, and its record.

Frozen data with bounds; no clock and no I/O. The messages on the wire, the history and the client's
API use the same classes, so each bound is stated once.
"""

import re
import signal
from collections.abc import Collection, Mapping
from datetime import datetime
from enum import Enum
from typing import Any, Literal, NewType

import attrs
from attrs import field, frozen

from jobworker.errors import InvalidParams, TooLarge
from jobworker.model.bounds import states, within
from jobworker.model.checked_classes import evolve_unchecked, raises_invalid_params
from jobworker.model.cores import check_cores
from jobworker.model.labels import check_labels
from jobworker.model.lifecycle import TERMINAL, Reason, State
from jobworker.model.volumes import VolumeMount, check_mounts
from jobworker.storage import MAX_DISK_BYTES, MIN_DISK_BYTES, MIN_MEMORY_BYTES, name_fault

JobId = NewType("JobId", int)

MAX_ARGUMENT_BYTES = 131_071
"""One argument or variable: the kernel's MAX_ARG_STRLEN less the closing NUL (execve(2))."""
MAX_ARGUMENTS_BYTES = 1 << 20
"""Arguments and environment together; the kernel's own bound is 2 MiB with an 8 MiB stack."""
MAX_ARGUMENTS = 16_384
MAX_VARIABLES = 49_152
"""Both environments together. The launcher checks them all in one turn of its loop."""
MAX_MEMORY_BYTES = 1 << 50
MAX_CPU_PERCENT = 100 * 8192
MIN_IO_BPS = 4096
MAX_IO_BPS = 1 << 50
MAX_OUTPUT_BYTES = 1 << 60
MAX_PROCESSES = 4_194_304
"""PID_MAX_LIMIT of 64-bit kernels (proc(5), /proc/sys/kernel/pid_max)."""
MAX_TIMEOUT_SECONDS = 10 * 365 * 86400.0
MAX_NAME_LENGTH = 128
MAX_ID = 65_535
"""The last user or group id inside a job: each job has a range of 65,536 ids."""
MAX_DETAIL = 4096
"""Characters of the detail of an end."""
MAX_SIGNAL_LENGTH = 32
MASK = "***"

Network = Literal["host", "none", "private"]
Part = Literal["command", "environment", "secret_environment", "workdir", "labels", "volumes"]
"""A part of a request that may be too long for frequent messages."""

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_IN_VARIABLES = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_\n"
_NO_VARIABLE = re.compile(rb"\n[0-9\n]")


class Stream(Enum):
    """One of a job's two outputs."""

    STDOUT = "stdout"
    STDERR = "stderr"


OutputPolicy = Literal["discard-output", "stop"]
"""For a job whose output cannot be kept: drop the output and let the job go on, or stop it."""


class OutputCut(Enum):
    """The reason why a job's log does not contain all of its output."""

    LIMIT = "limit"
    """The output reached the job's own limit."""
    TOTAL = "total"
    """All jobs' output together reached the server's limit."""
    DISK = "disk"
    """The server's disk was full, or a write failed."""


@raises_invalid_params
@frozen(kw_only=True)
class Limits:
    """A job's resource limits: unset is the server's default, 0 is no limit."""

    cpu_percent: int | None = field(
        default=None, validator=within(1, MAX_CPU_PERCENT, or_zero=True)
    )
    """Percent of one core; 200 is two cores."""
    memory_bytes: int | None = field(
        default=None, validator=within(MIN_MEMORY_BYTES, MAX_MEMORY_BYTES, or_zero=True)
    )
    """Hard limit, swap included; a job that exceeds it ends with reason `oom`."""
    io_bps: int | None = field(default=None, validator=within(MIN_IO_BPS, MAX_IO_BPS, or_zero=True))
    """Bytes per second on each block device, for reads and for writes."""
    processes: int | None = field(default=None, validator=within(1, MAX_PROCESSES, or_zero=True))
    """Processes and threads alive at a time."""
    output_bytes: int | None = field(
        default=None, validator=within(1, MAX_OUTPUT_BYTES, or_zero=True)
    )
    """Kept output of both streams together; `at_max_output` says what happens at the limit."""
    disk_bytes: int | None = field(default=None, validator=within(MIN_DISK_BYTES, MAX_DISK_BYTES))
    """Size of the disk for all that the job writes to its own root; there is always a limit."""

    def or_defaults(self, defaults: "Limits") -> "Limits":
        """Return these limits, with those of `defaults` in place of None."""
        return Limits(
            **{
                name: mine if mine is not None else attrs.asdict(defaults)[name]
                for name, mine in attrs.asdict(self).items()
            }
        )


def _are_texts(values: Collection[str]) -> bool:
    """Whether all values certainly pass `_text`, each alone or after a variable's name.

    One check of all values together is fast. If it is False, the caller checks each value.
    """
    longest = max(map(len, values), default=0)
    return 4 * longest <= MAX_ARGUMENT_BYTES // 2 and "\0" not in "".join(values)


def _are_variables(names: Collection[str]) -> bool:
    """Whether all names are certainly valid names of variables; one fast check for all."""
    lines = "\n".join(["", *names, "x"]).encode("utf-8", "replace")
    if lines.count(b"\n") > len(names) + 1 or _NO_VARIABLE.search(lines):
        return False
    return not lines.translate(None, _IN_VARIABLES)


def _text(what: str, value: str) -> None:
    if "\0" in value:
        raise ValueError(f"{what} contains a NUL character, which execve(2) cannot pass on")
    size = len(value.encode("utf-8", "surrogatepass"))
    if size > MAX_ARGUMENT_BYTES:
        raise ValueError(f"{what} has {size} bytes; the kernel allows {MAX_ARGUMENT_BYTES}")


def _bytes_of(texts: Collection[str]) -> int:
    """The bytes of texts as C strings, each with its closing NUL."""
    return len("".join(texts).encode()) + len(texts)


@states(minItems=1, maxItems=MAX_ARGUMENTS, items={"maxLength": MAX_ARGUMENT_BYTES})
def _check_command(_: object, __: object, value: tuple[str, ...]) -> None:
    if not value or not value[0]:
        raise ValueError("is empty: name the program to run")
    if len(value) > MAX_ARGUMENTS:
        raise ValueError(f"has {len(value)} arguments; at most {MAX_ARGUMENTS} are allowed")
    if _are_texts(value):
        return
    for number, argument in enumerate(value):
        _text(f"argument {number}", argument)


@states(propertyNames={"pattern": f"^{_VARIABLE.pattern}$"})
def _check_environment(_: object, __: object, value: Mapping[str, str]) -> None:
    longest = max(map(len, value), default=0)
    if longest < MAX_ARGUMENT_BYTES // 8 and _are_variables(value) and _are_texts(value.values()):
        return
    for name, content in value.items():
        if not _VARIABLE.fullmatch(name):
            raise ValueError(f"{name!r} is not a name for a variable (letters, digits and _)")
        _text(f"the variable {name}", f"{name}={content}")


@states(pattern="^(/|$)", maxLength=MAX_ARGUMENT_BYTES)
def _check_workdir(_: object, __: object, value: str) -> None:
    _text("the path", value)
    if value and not value.startswith("/"):
        raise ValueError(f"must be an absolute path inside the job's root, not {value!r}")


@states(maxLength=MAX_NAME_LENGTH)
def _check_runtime(_: object, __: object, value: str) -> None:
    if value and (fault := name_fault(value)):
        raise ValueError(fault)


def check_job_name(_: object, __: object, value: str) -> None:
    """A validator of attrs for names of jobs. Raises ValueError."""
    if len(value) > MAX_NAME_LENGTH or not value.isprintable():
        raise ValueError(f"must be at most {MAX_NAME_LENGTH} printable characters")


@raises_invalid_params
@frozen(kw_only=True)
class JobSpec:
    """A client's request for a job."""

    command: tuple[str, ...] = field(validator=_check_command)
    """The program (a path, or a name in the job's PATH) and its arguments."""
    environment: Mapping[str, str] = field(factory=dict, validator=_check_environment)
    """Variables; they add to or replace the sandbox's own (PATH, HOME, USER, LANG…)."""
    secret_environment: Mapping[str, str] = field(
        factory=dict, validator=_check_environment, repr=False
    )
    """Variables that only the job sees; in records their values are masked for everyone."""
    workdir: str = field(default="", validator=_check_workdir)
    """Working directory, an absolute path inside the job's root; "" is the job's workspace."""
    name: str = field(default="", validator=check_job_name)
    limits: Limits = Limits()
    timeout_seconds: float | None = field(default=None, validator=within(0, MAX_TIMEOUT_SECONDS))
    """Longest run time in seconds; unset is the server's default, 0 is no limit."""
    network: Network = "host"
    """`host`: the host's own, which the job can use but not configure; `none`: only a loopback;
    `private`: only outbound connections over IPv4, none to the host except for DNS to its
    resolver."""
    runtime: str = field(default="", validator=_check_runtime)
    """A root tree of the server's configuration; "" is the host's programs."""
    volumes: tuple[VolumeMount, ...] = field(default=(), validator=check_mounts)
    cpu_cores: str = field(default="", validator=check_cores)
    """The processor cores that the job may use, such as "0-3,5"; "" is all."""
    uid: int = field(default=0, validator=within(0, MAX_ID))
    """User id of the program, inside the job."""
    gid: int | None = field(default=None, validator=within(0, MAX_ID))
    """Group id of the program, inside the job; unset is the same number as `uid`."""
    init: bool = False
    """Start the program below a reaping init, PID 1: signals then have their default action."""
    labels: Mapping[str, str] = field(factory=dict, validator=check_labels)
    """Labels by which clients find the job, see `model.labels`."""
    at_max_output: OutputPolicy | None = None
    """What happens at `limits.output_bytes`; unset is the server's default."""

    def check_size(self) -> int:
        """Return the bytes of arguments and environment.

        Raises TooLarge above `MAX_ARGUMENTS_BYTES`, or for over `MAX_VARIABLES` variables.
        """
        variables = {**self.environment, **self.secret_environment}
        if len(variables) > MAX_VARIABLES:
            raise TooLarge(
                f"cannot run the command: the environment has {len(variables)} variables, "
                f"at most {MAX_VARIABLES} are allowed",
                remedy="put the data into a file or read it from a program",
            )
        total = _bytes_of(self.command) + _bytes_of(variables) + _bytes_of(variables.values())
        if total > MAX_ARGUMENTS_BYTES:
            raise TooLarge(
                f"cannot run the command: arguments and environment have {total} bytes, "
                f"at most {MAX_ARGUMENTS_BYTES} are allowed",
                remedy="put the data into a file or read it from a program",
            )
        return total

    def without_secrets(self, **changes: Any) -> "JobSpec":
        """Return the request with masked values of secret variables, to be shown and stored.

        `changes` are other fields to set; the caller guarantees that their values are valid.
        """
        masked = dict.fromkeys(self.secret_environment, MASK)
        return evolve_unchecked(self, secret_environment=masked, **changes)


@frozen(kw_only=True)
class Usage:
    """What a job has used since its start."""

    cpu_ns: int = 0
    throttled_ns: int = 0
    """Time that the job waited for its CPU limit."""
    memory_bytes: int = 0
    memory_peak_bytes: int = 0
    read_bytes: int = 0
    write_bytes: int = 0
    processes: int = 0
    oom_kills: int = 0
    """Kills for memory: at the job's own limit, or elsewhere if `detail` says so."""


@frozen(kw_only=True)
class JobRecord:
    """The record of one job: its request, its state and its end."""

    id: JobId
    spec: JobSpec
    owner: str
    """Common name of the certificate of the client that requested the job."""
    state: State = State.PENDING
    created_at: datetime
    started_at: datetime | None = None
    stop_requested_at: datetime | None = None
    """When a client first asked to stop the job."""
    ended_at: datetime | None = None
    reason: Reason | None = None
    exit_code: int | None = None
    signal: int | None = None
    detail: str = ""
    """Further facts about the end, such as the failed step of a start."""
    usage: Usage | None = None
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    discarded_bytes: int = 0
    """Output that was not kept: above the limit on a job's output, or refused by the disk."""
    output_cut: OutputCut | None = None
    """Why output was not kept; unset if all of it was."""
    output_removed_at: datetime | None = None
    """When the job's output was removed, by retention or on request."""
    abridged: tuple[Part, ...] = ()
    """The parts of `spec` that are cut or left out here; `job.status` returns all of it."""

    def masked(self) -> "JobRecord":
        """Return the record for a client that may not run jobs: values of variables are masked,
        because they may be secrets."""
        hidden = dict.fromkeys(self.spec.environment, MASK)
        return attrs.evolve(self, spec=evolve_unchecked(self.spec, environment=hidden))

    def noted(self, words: str) -> "JobRecord":
        """Return the record with `words` added to its detail, unless the detail contains them."""
        if words in self.detail:
            return self
        return attrs.evolve(self, detail="; ".join(filter(None, (self.detail, words))))

    @property
    def ended(self) -> bool:
        """Whether the job has come to its end."""
        return self.state in TERMINAL


@frozen(kw_only=True)
class JobStatus(JobRecord):
    """The current record of one job, with warnings about its host."""

    warnings: tuple[str, ...] = ()
    """Conditions of the host that may harm the running job, such as a disk that is almost full."""


LOST_WRITES = "is lost: the host could not write it"
"""The end of a sentence in `detail`, for a job that lost some data that it wrote."""
LOSSES_UNKNOWN = "is not known: the host could not look"
"""The end of a sentence in `detail`, for a job that may have lost data on a volume."""
SERVICE_ENDED = "its service ended"
"""In `detail` of a job that was stopped only because its service ended."""
KILLED_FOR_MEMORY = "killed for memory"
"""In `detail` if processes were killed for memory for another cause than the job's own limit."""


def shell_exit_code(record: JobRecord) -> int:
    """Return an ended job's exit code in the convention of shells.

    0 for COMPLETED; the job's own code; 124 for a time-out (timeout(1)); 137 for OOM;
    74 (EX_IOERR, sysexits.h) if the job ended with 0 and lost data that it wrote;
    128 + N for signal N, also if a stop sent it; 127 or 126 if the program could not
    be executed; 125 if the job ended and never ran.
    """
    if record.reason is Reason.TIMEOUT:
        return 124
    if record.reason is Reason.OOM:
        return 128 + signal.SIGKILL
    if record.exit_code == 0 and LOST_WRITES in record.detail:
        return 74
    if record.exit_code is not None:
        return record.exit_code
    if record.signal is not None:
        return 128 + record.signal
    return 125


def parse_signal(name: str) -> signal.Signals:
    """Return the signal that "TERM", "SIGTERM" or "15" names. Raises InvalidParams."""
    try:
        if name.isascii() and name.isdigit():
            return signal.Signals(int(name))
        upper = name.upper()
        return signal.Signals[upper if upper.startswith("SIG") else f"SIG{upper}"]
    except (KeyError, ValueError):
        raise InvalidParams(
            f"cannot send the signal {name[:MAX_SIGNAL_LENGTH]!r}: no such signal",
            remedy="name a signal as for kill(1), such as TERM, INT or 15",
        ) from None
