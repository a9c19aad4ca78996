"""The service's settings: one TOML file, a default for every key, one error for all faults.

`load` returns a `Settings`, or raises a ConfigError that names the file and, for each fault, the
key and what is allowed. Nothing is guessed: an unknown key is a fault, and so is a string in place
of a number. Relative paths are relative to the file's own directory. `etc/worker.toml` documents
each key; a test checks that it has every key, with its default.
"""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Literal

from attrs import evolve, field, frozen

from jobworker.config.default_paths import default_certificate, default_state_directory
from jobworker.config.durations import check_duration, check_positive_duration
from jobworker.config.limits import ConnectionLimits
from jobworker.config.roles import RoleSettings, check_names
from jobworker.config.runtimes import RuntimeSettings, check_runtime_names
from jobworker.errors import ConfigError
from jobworker.model.access import BUILT_IN, Permission, Scope
from jobworker.model.bounds import within
from jobworker.model.job import (
    MAX_CPU_PERCENT,
    MAX_IO_BPS,
    MAX_PROCESSES,
    MIN_IO_BPS,
    Limits,
    OutputPolicy,
)
from jobworker.model.subjects import entry_fault
from jobworker.model.units import MEBIBYTE
from jobworker.regular_file import NotText, read_text
from jobworker.serialization.convert import faults_of
from jobworker.serialization.toml_text import MalformedTOML, loads

DEFAULT_PORT = 50051

FIRST_UID = 1_879_048_192
"""The first id of the jobs' ranges. systemd reserves no ids from here to 2,147,352,575 (see its
document UIDS-GIDS): 4,096 ranges of 65,536. The last 16 ranges are for the services' own ids
(`server.host.id_ranges`)."""
LAST_UID = 2_147_352_575

Controller = Literal["cpu", "memory", "io", "pids"]
CONTROLLERS: tuple[Controller, ...] = ("cpu", "memory", "io", "pids")

DEFAULT_PROGRAMS = ("/usr", "/var/lib/dpkg", "/var/lib/apt")
DEFAULT_ETC = tuple(
    (
        "passwd group hosts host.conf gai.conf resolv.conf nsswitch.conf services protocols "
        "networks ld.so.cache ld.so.conf ld.so.conf.d ssl/certs ssl/openssl.cnf "
        "ca-certificates ca-certificates.conf pki/tls/certs pki/ca-trust/extracted alternatives "
        "localtime timezone locale.alias locale.conf os-release debian_version login.defs shells "
        "profile profile.d bash.bashrc inputrc terminfo mime.types magic magic.mime python3 "
        "python3.11 python3.12 python3.13 perl fonts skel apt/sources.list apt/sources.list.d "
        "apt/apt.conf apt/apt.conf.d apt/preferences apt/preferences.d apt/trusted.gpg "
        "apt/trusted.gpg.d apt/keyrings dpkg debconf.conf adduser.conf deluser.conf "
        "default/useradd pam.conf pam.d pip.conf xdg/pip gitconfig"
    ).split()
)


def _absolute(_: object, __: object, value: str) -> None:
    if not value.startswith("/") or "/../" in f"{value}/" or "\0" in value:
        raise ValueError(f"must be an absolute path without '..', not {value!r}")


KERNEL_TREES = ("/dev", "/proc", "/sys")
"""Directories of the kernel's, which have no programs. A job has a /dev and a /proc of its own."""


def _programs(_: object, __: object, value: tuple[str, ...]) -> None:
    for path in value:
        _absolute(None, None, path)
        if path == "/":
            raise ValueError("must not be '/': jobs must never see all of the host")
        for tree in KERNEL_TREES:
            if PurePosixPath(f"/{path.strip('/')}").is_relative_to(tree):
                raise ValueError(f"must not be {path!r}: {tree} has no programs of the host")


def _file(_: object, __: object, value: str) -> None:
    if not value or "\0" in value:
        raise ValueError(f"must be the path of a file, not {value!r}")


def _path_or_empty(_: object, __: object, value: str) -> None:
    if "\0" in value:
        raise ValueError("must be the path of a file, or empty")


def _entries(_: object, __: object, value: Mapping[str, str]) -> None:
    if faults := [fault for entry in value if (fault := entry_fault(entry))]:
        raise ValueError("; ".join(faults))


def _user(_: object, __: object, value: str) -> None:
    if not 0 < len(value) <= 256 or "\0" in value:
        raise ValueError("must be a user's name or number, or 'auto'")


def _certificate(name: str) -> Callable[[], str]:
    return partial(default_certificate, name)


def _socket(_: object, __: object, value: str) -> None:
    if value:
        _absolute(None, None, value)
        if len(os.fsencode(value)) > 107:
            raise ValueError("is longer than 107 bytes, the most for a socket's path (unix(7))")


def _group(_: object, __: object, value: str) -> None:
    if ".." in value.split("/") or "\0" in value:
        raise ValueError(f"must be a path below the cgroup mount without '..', not {value!r}")


def _first_uid(_: object, __: object, value: int) -> None:
    if value and not 100_000 <= value <= 4_200_000_000:
        raise ValueError(f"must be from 100000 to 4200000000, or 0 for a free range, not {value}")


def _below_etc(_: object, __: object, value: tuple[str, ...]) -> None:
    for name in value:
        if not name or name.startswith("/") or ".." in name.split("/") or "\0" in name:
            raise ValueError(f"must contain names below /etc, such as 'hosts', not {name!r}")


def _host(_: object, __: object, value: str) -> None:
    if not value or any(character.isspace() or character == "\0" for character in value):
        raise ValueError("must be an address to listen on, such as 0.0.0.0, :: or 127.0.0.1")


@frozen(kw_only=True)
class ServerSettings:
    """The address to listen on, and the patience with slow clients."""

    address: str = field(default="0.0.0.0", validator=_host)  # noqa: S104 - clients need a certificate
    port: int = field(default=DEFAULT_PORT, validator=within(0, 65_535))
    """0 uses a free port, which the service logs."""
    stall_timeout: str = field(default="1m", validator=check_positive_duration)


@frozen(kw_only=True)
class WorkerSettings:
    """The jobs' limits, the retention of their output, and the directory of the service's state."""

    state_dir: str = field(factory=default_state_directory, validator=_absolute)
    user: str = field(default="auto", validator=_user)
    default_cpu_limit: int = field(default=100, validator=within(1, MAX_CPU_PERCENT, or_zero=True))
    default_memory_limit: int = field(default=512, validator=within(4, 1 << 30, or_zero=True))
    default_io_limit: int = field(default=0, validator=within(MIN_IO_BPS, MAX_IO_BPS, or_zero=True))
    default_process_limit: int = field(
        default=1024, validator=within(1, MAX_PROCESSES, or_zero=True)
    )
    max_concurrent_jobs: int = field(default=100, validator=within(1, 4000))
    max_waiting_jobs: int = field(default=1000, validator=within(0, 1_000_000))
    max_output: int = field(default=1024, validator=within(1, 1 << 30, or_zero=True))
    at_max_output: OutputPolicy = "discard-output"
    on_disk_full: OutputPolicy = "discard-output"
    keep_free: int = field(default=64, validator=within(1, 1 << 30, or_zero=True))
    max_total_output: int = field(default=0, validator=within(1, 1 << 30, or_zero=True))
    keep_output_age: str = field(default="0", validator=check_duration)
    keep_output_jobs: int = field(default=10_000, validator=within(1, 1 << 30, or_zero=True))
    job_timeout: str = field(default="1h", validator=check_duration)
    max_job_timeout: str = field(default="7d", validator=check_positive_duration)
    """The longest time-out that a role without the permission `unbounded` may request."""
    stop_grace: str = field(default="5s", validator=check_duration)
    jobs_on_exit: Literal["auto", "leave", "stop"] = "auto"

    @property
    def default_limits(self) -> Limits:
        """The limits of a job whose request has none."""
        return Limits(
            cpu_percent=self.default_cpu_limit,
            memory_bytes=self.default_memory_limit * MEBIBYTE,
            io_bps=self.default_io_limit,
            processes=self.default_process_limit,
            output_bytes=self.max_output * MEBIBYTE,
        )


@frozen(kw_only=True)
class SecuritySettings:
    """Certificates and TLS."""

    ca_cert: str = field(factory=_certificate("ca-cert.pem"), validator=_file)
    server_cert: str = field(factory=_certificate("server-cert.pem"), validator=_file)
    server_key: str = field(factory=_certificate("server-key.pem"), validator=_file)
    crl: str = field(factory=_certificate("ca-crl.pem"), validator=_path_or_empty)
    """The CA's revocation list; "" for none."""
    min_tls_version: Literal["1.2", "1.3"] = "1.3"
    subjects: Mapping[str, str] = field(factory=dict, validator=_entries)
    """The table of roles by values in certificates (`model.subjects`)."""
    roles_from_ou: bool = True


@frozen(kw_only=True)
class CgroupSettings:
    """The control groups that enforce limits."""

    enable_controllers: tuple[Controller, ...] = CONTROLLERS
    parent: str = field(default="", validator=_group)


@frozen(kw_only=True)
class SandboxSettings:
    """The files that a job sees, its user ids on the host, and its confinement."""

    programs: tuple[str, ...] = field(default=DEFAULT_PROGRAMS, validator=_programs)
    etc: tuple[str, ...] = field(default=DEFAULT_ETC, validator=_below_etc)
    first_uid: int = field(default=FIRST_UID, validator=_first_uid)
    """0 uses a free range."""
    spares: int = field(default=2, validator=within(0, 64))
    tmpfs_limit: int = field(default=256, validator=within(1, 1 << 30))
    seccomp_profile: str = field(default="", validator=_path_or_empty)
    disk_limit: int = field(default=1024, validator=within(16, 1 << 24))
    overcommit_disk: bool = True


@frozen(kw_only=True)
class LauncherSettings:
    """The process that starts jobs."""

    socket: str = field(default="", validator=_socket)


@frozen(kw_only=True)
class LoggingSettings:
    """The level and the format of the log."""

    level: Literal["DEBUG", "INFO", "WARN", "ERROR"] = "INFO"
    format: Literal["text", "json"] = "text"


@frozen(kw_only=True)
class Settings:
    """All settings of a service, one field for each section of the file."""

    server: ServerSettings = ServerSettings()
    worker: WorkerSettings = WorkerSettings()
    security: SecuritySettings = SecuritySettings()
    cgroup: CgroupSettings = CgroupSettings()
    sandbox: SandboxSettings = SandboxSettings()
    launcher: LauncherSettings = LauncherSettings()
    limits: ConnectionLimits = field(factory=ConnectionLimits)
    logging: LoggingSettings = LoggingSettings()
    roles: Mapping[str, RoleSettings] = field(factory=dict, validator=check_names)
    runtimes: Mapping[str, RuntimeSettings] = field(factory=dict, validator=check_runtime_names)


def load(path: Path) -> Settings:
    """Read the settings in `path`. Raises ConfigError with every fault of the file."""
    try:
        data = loads(read_text(path))
    except OSError as error:
        raise ConfigError(
            f"cannot read the configuration {path}: {error.strerror}",
            remedy="name an existing file with --config, or see etc/worker.toml for an example",
        ) from error
    except NotText as error:
        raise ConfigError(
            f"cannot read the configuration {path}: {error}",
            remedy="convert it to UTF-8 without a byte order mark",
        ) from None
    except MalformedTOML as error:
        raise ConfigError(
            f"cannot read the configuration {path}: {error}",
            remedy="correct that line; etc/worker.toml is an example",
        ) from None
    settings, faults = faults_of(Settings, data)
    if settings is not None:
        settings = _with_absolute_paths(settings, path.resolve().parent)
        faults = _faults_between(settings)
    if settings is None or faults:
        raise ConfigError(
            f"cannot use the configuration {path}: {'; '.join(faults)}",
            remedy="correct these keys; etc/worker.toml explains each one",
            data={"faults": list(faults)},
        )
    return settings


def with_launcher_socket(settings: Settings, path: Path) -> Settings:
    """Return the settings with another launcher.socket. Raises ConfigError."""
    try:
        launcher = LauncherSettings(socket=os.path.abspath(path))
    except ValueError as error:
        raise ConfigError(
            f"cannot use the launcher's socket {path}: it {error}", remedy="give another path"
        ) from None
    return evolve(settings, launcher=launcher)


def with_first_uid(settings: Settings, first_uid: int) -> Settings:
    """Return the settings with another sandbox.first_uid, the start of the range in use."""
    return evolve(settings, sandbox=evolve(settings.sandbox, first_uid=first_uid))


def _with_absolute_paths(settings: Settings, base: Path) -> Settings:
    security, sandbox = settings.security, settings.sandbox
    return evolve(
        settings,
        security=evolve(
            security,
            ca_cert=str(base / security.ca_cert),
            server_cert=str(base / security.server_cert),
            server_key=str(base / security.server_key),
            crl=str(base / security.crl) if security.crl else "",
        ),
        sandbox=evolve(
            sandbox,
            seccomp_profile=sandbox.seccomp_profile and str(base / sandbox.seccomp_profile),
        ),
    )


def _faults_between(settings: Settings) -> tuple[str, ...]:
    """The faults of keys that are valid alone and do not fit together."""
    known = sorted({*settings.roles, *(role.name for role in BUILT_IN)})
    faults = [
        f"security.subjects: {entry!r} has the role {role!r}, which is none of {', '.join(known)}"
        for entry, role in settings.security.subjects.items()
        if role not in known
    ]
    faults += [
        f"roles[{name!r}].scope: must be 'all' if 'volumes' is the only operation: all names share "
        "the volumes, so a role with the scope 'own' could do nothing with them"
        for name, role in settings.roles.items()
        if set(role.operations) == {Permission.VOLUMES} and role.scope is Scope.OWN
    ]
    worker, sandbox = settings.worker, settings.sandbox
    enabled = settings.cgroup.enable_controllers
    for key, controller, value in (
        ("default_cpu_limit", "cpu", worker.default_cpu_limit),
        ("default_memory_limit", "memory", worker.default_memory_limit),
        ("default_io_limit", "io", worker.default_io_limit),
        ("default_process_limit", "pids", worker.default_process_limit),
    ):
        if value and controller not in enabled:
            faults.append(
                f"worker.{key}: needs {controller!r} in cgroup.enable_controllers, or be 0"
            )
    places = worker.max_concurrent_jobs + sandbox.spares
    last = sandbox.first_uid + places * 65_536 + places  # the service, and a gateway for each job
    if last > (1 << 32) - 3:
        faults.append("sandbox.first_uid: leaves no room for a range of ids for each job")
    for key, path in (
        ("worker.state_dir", worker.state_dir),
        ("security.server_key", settings.security.server_key),
    ):
        if any(_lies_in(path, shown) for shown in sandbox.programs):
            faults.append(f"{key}: lies in sandbox.programs, where every job could read it")
    return tuple(faults)


def _lies_in(path: str, directory: str) -> bool:
    # Follow symbolic links: a job sees the target of a link.
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(directory))
