"""The service's preparation before its first client, with root's rights if it has them.

In order: read certificates and key, make the state directory, take its lock, bind the port, start
the launcher or connect to a running one, become the unprivileged user. Each step that may fail is
done here, before the first client. If one fails, its error has a remedy, and the service leaves
nothing behind.

An ordinary user may run a service too. The service then stays that user. So does its launcher, as
root of its own user namespace (`sandbox.launcher.own_namespace`). If such a launcher cannot enforce
something, the service refuses it, or logs it at the start.
"""

import hashlib
import importlib
import os
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

from attrs import frozen

from jobworker.config.settings import Settings, with_first_uid
from jobworker.errors import ConfigError, JobworkerError
from jobworker.model.units import MEBIBYTE
from jobworker.pki.expiry import expiry_warnings
from jobworker.pki.tls import key_mode_warning
from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.cgroup.hierarchy import step_into_leaf
from jobworker.sandbox.protocol.policy import LauncherPolicy, policy_message
from jobworker.sandbox.seccomp.compile import load_filters
from jobworker.sandbox.service.launch import OpenedLauncher, connect_launcher, start_launcher
from jobworker.server.access.connected_clients import TlsState
from jobworker.server.connections.listening import bind
from jobworker.server.host.copy_on_write import overwrite_warnings
from jobworker.server.host.descriptor_budget import outputs_within
from jobworker.server.host.disk_promises import promise_warnings
from jobworker.server.host.id_ranges import lock_ids, lock_own_id, own_id
from jobworker.server.host.process_limits import lift_file_size_limit, raise_descriptor_limit
from jobworker.server.host.service_user import launcher_ids, service_ids
from jobworker.server.reporting.notify import Notifier
from jobworker.server.startup.configuration_reader import (
    ConfigurationReader,
    configured_files,
    start_configuration_reader,
)
from jobworker.server.startup.state_directory import (
    LEAVING_SECONDS,
    holds,
    lock_for_launcher,
    lock_for_service,
    make_service_directory,
    make_state_directory,
)

_LATE_IMPORTS = ("_strptime", "encodings.idna", "stringprep", "unicodedata")
"""Modules that the standard library imports only at first use. The unprivileged user may be unable
to read Python's directory (below /root, say), so the service imports them before."""


@frozen(kw_only=True)
class Prepared:
    """The result of the preparation: what the service needs to serve clients."""

    settings: Settings
    """The settings in force. If the configuration names no ids of jobs, these have free ones."""
    configured: Settings
    """The settings as they were read; a reload compares with them."""
    tls_state: TlsState
    reader: ConfigurationReader
    listeners: tuple[socket.socket, ...]
    """Bound sockets that do not listen yet."""
    launcher: OpenedLauncher
    directory: Path
    """The service's own part of the state directory."""
    notifier: Notifier
    locks: tuple[int, ...]
    """Descriptors of the locks on the state directory and on the service's id; this process holds
    them until it ends."""
    warnings: tuple[str, ...]
    """Lines for the log: an exposed key, say, or a limit that this host cannot enforce."""
    max_open_outputs: int
    """Outputs of ended jobs that may be read at a time."""


def prepare(settings: Settings, config: Path | None) -> Prepared:
    """Do everything that may need root, and then give up root's rights. Raises JobworkerError.

    `config` is the file that the settings come from: the reader reads it again at each reload.
    """
    if settings.worker.jobs_on_exit == "leave" and not settings.launcher.socket:
        raise ConfigError(
            "cannot leave jobs behind (worker.jobs_on_exit): the launcher ends with the service",
            remedy="set launcher.socket, and run `worker launcher`; or set jobs_on_exit to 'auto'",
        )
    limit = raise_descriptor_limit()
    small_files = lift_file_size_limit()
    outputs_within(settings, limit)  # raises if there are too few descriptors, before any change
    files = configured_files(settings.security)
    tls_state = TlsState.of(files, settings.security)
    exposed = key_mode_warning(Path(settings.security.server_key))
    service_ids(settings)  # raises if there is no such user, before any change
    with ExitStack() as undo:
        reader = start_configuration_reader(
            config
        )  # first: it must not inherit descriptors opened below
        undo.callback(reader.close)
        state = Path(settings.worker.state_dir)
        configured, opened = settings, None
        if settings.launcher.socket and not holds(state, "lock"):
            opened = _open_launcher(settings, state)  # raises if it serves another state directory
            undo.callback(opened[0].close)
        make_state_directory(state)
        lock = lock_for_service(state)
        undo.callback(os.close, lock)
        listeners = bind(settings.server.address, settings.server.port)
        for listener in listeners:
            undo.callback(listener.close)
        step_into_leaf()
        if opened is None:
            opened = _open_launcher(settings, state)
            undo.callback(opened[0].close)
        launcher, settings, differences = opened
        max_open_outputs = outputs_within(settings, limit, running=len(launcher.jobs))
        jobs, locks, unusual = launcher_ids(launcher), [lock], []
        ids = service_ids(settings, jobs)
        if ids is None:
            own = lock_own_id(state, jobs)
            undo.callback(os.close, own.descriptor)
            locks.append(own.descriptor)
            ids = own.first, own.first
            if own.first != own_id(state):
                unusual.append(
                    f"the service runs as user {own.first}: its own id, {own_id(state)}, is a "
                    "user's, another service's, or among those of jobs"
                )
        uid, gid = ids
        make_service_directory(state, uid, gid)
        notifier = Notifier()
        _give_up_root(uid, gid)
        if not os.access(state / "service", os.R_OK | os.W_OK | os.X_OK):
            raise _unreachable(state, uid)
        undo.pop_all()
    return Prepared(
        settings=settings,
        configured=configured,
        tls_state=tls_state,
        reader=reader,
        listeners=listeners,
        launcher=launcher,
        directory=state / "service",
        notifier=notifier,
        locks=tuple(locks),
        warnings=(
            *([exposed] if exposed else []),
            *expiry_warnings(files, datetime.now(UTC)),
            *(promise_warnings(settings, state) if launcher.bounds_disks else ()),
            *overwrite_warnings(state / "service"),
            *(f"this host: {gap}" for gap in launcher.gaps),
            *differences,
            *unusual,
            *(fault for fault in (notifier.fault, small_files) if fault),
        ),
        max_open_outputs=max_open_outputs,
    )


def _unreachable(state: Path, uid: int) -> ConfigError:
    """The error that names the first directory on the path which this user may not pass."""
    real = Path(os.path.realpath(state))
    closed = [each for each in (*reversed(real.parents), real) if not os.access(each, os.X_OK)]
    where = closed[0] if closed else real / "service"
    return ConfigError(
        f"cannot use worker.state_dir {state}: the service, as user {uid}, cannot reach it: it may "
        f"not pass through {where}",
        remedy=f"let others pass: chmod o+x {where}",
    )


def instance_name(state: Path) -> str:
    """The name of the control groups of the service that has this state directory."""
    digest = hashlib.sha256(os.fsencode(os.path.realpath(state))).hexdigest()
    return f"jobworker-{digest[:8]}"


def _open_launcher(
    settings: Settings, state: Path
) -> tuple[OpenedLauncher, Settings, Sequence[str]]:
    """Connect to the launcher that the settings name, or start one.

    Returns the launcher, the settings with its ids of jobs, and a warning if its policy differs
    from the one that these settings would give it.
    """
    if settings.launcher.socket:
        launcher = connect_launcher(settings.launcher.socket)
        try:
            _check_instance(launcher, state, settings.launcher.socket)
            first = launcher.policy.get("first_uid")
            if not settings.sandbox.first_uid and isinstance(first, int):
                settings = with_first_uid(settings, first)
            return launcher, settings, _differences(launcher, policy_for(settings, state))
        except BaseException:
            launcher.close()
            raise
    locks = {"lock": lock_for_launcher(state, LEAVING_SECONDS)}
    try:
        if os.geteuid() == 0:
            ids = lock_ids(settings)
            locks["ids"] = ids.descriptor
            settings = with_first_uid(settings, ids.first)
        return start_launcher(policy_for(settings, state), locks), settings, ()
    finally:
        for lock in locks.values():
            os.close(lock)  # the launcher has duplicates


def _check_instance(launcher: OpenedLauncher, state: Path, path: str) -> None:
    if launcher.policy.get("instance") != instance_name(state):
        raise ConfigError(
            f"cannot use the launcher at {path}: it keeps the jobs of another worker.state_dir",
            remedy="give both the same configuration, and start them anew",
        )


def _differences(launcher: OpenedLauncher, policy: LauncherPolicy) -> list[str]:
    """A warning with the keys in which the launcher's policy differs from `policy`, if any do."""
    now = policy_message(policy)
    different = [key for key, value in now.items() if launcher.policy.get(key, value) != value]
    if not different:
        return []
    return [
        f"the launcher still works by older settings ({', '.join(sorted(different))}); "
        "they change when it is started anew, which ends its jobs"
    ]


def policy_for(settings: Settings, state: Path) -> LauncherPolicy:
    """The policy for the launcher of the service with this state directory."""
    sandbox, worker = settings.sandbox, settings.worker
    return LauncherPolicy(
        instance=instance_name(state),
        stage=str(state / "stage"),
        scratch=str(state / "scratch"),
        volumes=str(state / "volumes"),
        controllers=settings.cgroup.enable_controllers,
        cgroup_parent=settings.cgroup.parent,
        programs=sandbox.programs,
        etc=sandbox.etc,
        first_uid=sandbox.first_uid,
        max_jobs=worker.max_concurrent_jobs,
        spares=min(sandbox.spares, worker.max_concurrent_jobs),
        tmpfs_bytes=sandbox.tmpfs_limit * MEBIBYTE,
        filters=load_filters(sandbox.seccomp_profile),
        disk_bytes=sandbox.disk_limit * MEBIBYTE,
        keep_free_bytes=worker.keep_free * MEBIBYTE,
        overcommit=sandbox.overcommit_disk,
        runtimes={name: runtime.path for name, runtime in settings.runtimes.items()},
    )


def spool_directory(settings: Settings) -> Path:
    """The directory that holds jobs' output."""
    return Path(settings.worker.state_dir) / "service" / "spool"


def _give_up_root(uid: int, gid: int) -> None:
    """Become the unprivileged user; root's rights cannot come back. Raises JobworkerError."""
    for name in _LATE_IMPORTS:
        importlib.import_module(name)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    sc.prctl(sc.PR_SET_NO_NEW_PRIVS, 1)
    os.umask(0o77)
    if 0 in (*os.getresuid(), *os.getresgid()):
        raise JobworkerError("cannot give up root")
