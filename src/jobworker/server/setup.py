"""What the service does while it still has root's rights, and how it gives them up.

In order: read certificates and key, make the state directory, take its lock, listen, start the
launcher, become the unprivileged user. Everything that may fail does so here, before the first
client, with an error that names the remedy; and nothing is left behind then.

    state_dir/          root's; only the launcher writes what stands directly in it
      lock              held as long as the service lives
      stage/            where the launcher mounts the jobs' root, in a namespace of its own
      scratch/          the jobs' files
      service/          the unprivileged user's: history.db, spool/
"""

import errno
import fcntl
import hashlib
import importlib
import os
import pwd
import resource
import socket
import ssl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from attrs import frozen

from jobworker.config import MEBIBYTE, Settings
from jobworker.errors import AddressUnavailable, ConfigError, HostUnsupported, JobworkerError
from jobworker.pki.tls import key_mode_warning, server_context
from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.children import Policy
from jobworker.sandbox.launch import LauncherProcess, start_launcher
from jobworker.sandbox.seccomp_filter import load_filters
from jobworker.sandbox.user_namespaces import IDS_PER_JOB
from jobworker.server.notify import Notifier

BACKLOG = 1024

_LATE_IMPORTS = ("_strptime", "encodings.idna", "stringprep", "unicodedata")
"""What the standard library imports at first use. The unprivileged user may be unable to read the
directory that holds Python (below /root, say), so all that may be needed is imported before."""
SERVICE_USER = "jobworker"


@frozen(kw_only=True)
class Prepared:
    """All that needed root's rights."""

    settings: Settings
    tls: ssl.SSLContext
    listeners: tuple[socket.socket, ...]
    launcher: LauncherProcess
    directory: Path
    """The service's own part of the state directory."""
    notifier: Notifier
    lock: int
    warnings: tuple[str, ...]
    """What is worth a word in the log: an exposed key, what this host cannot enforce."""


def prepare(settings: Settings) -> Prepared:
    """Do all that needs root, and give root up. Raises JobworkerError; see the module."""
    if os.geteuid() != 0:
        raise HostUnsupported(
            "cannot serve: jobs need namespaces and control groups, which root alone may make",
            remedy="run it as root (it gives root up once it has started)",
        )
    security = settings.security
    tls = server_context(
        ca=Path(security.ca_cert),
        certificate=Path(security.server_cert),
        key=Path(security.server_key),
        min_version=security.min_tls_version,
    )
    exposed = key_mode_warning(Path(security.server_key))
    uid, gid = service_ids(settings)
    with ExitStack() as undo:
        state = Path(settings.worker.state_dir)
        lock = _make_state(state, uid, gid)
        undo.callback(os.close, lock)
        listeners = listen(settings.server.address, settings.server.port)
        for listener in listeners:
            undo.callback(listener.close)
        launcher = start_launcher(policy_for(settings, state))
        undo.callback(launcher.sock.close)
        notifier = Notifier()
        _give_up_root(uid, gid)
        if not os.access(state / "service", os.R_OK | os.W_OK | os.X_OK):
            raise ConfigError(
                f"cannot use worker.state_dir {state}: the service, as user {uid}, cannot reach it",
                remedy="let others pass through the directories above it (chmod o+x)",
            )
        undo.pop_all()
    return Prepared(
        settings=settings,
        tls=tls,
        listeners=listeners,
        launcher=launcher,
        directory=state / "service",
        notifier=notifier,
        lock=lock,
        warnings=tuple(
            warning for warning in (exposed, *(f"this host: {g}" for g in launcher.gaps)) if warning
        ),
    )


def instance_name(state: Path) -> str:
    """The name of the control groups of the service that has this state directory."""
    digest = hashlib.sha256(os.fsencode(os.path.realpath(state))).hexdigest()
    return f"jobworker-{digest[:8]}"


def policy_for(settings: Settings, state: Path) -> Policy:
    """What the launcher of the service that has this state directory is told."""
    sandbox, worker = settings.sandbox, settings.worker
    return Policy(
        instance=instance_name(state),
        stage=str(state / "stage"),
        scratch=str(state / "scratch"),
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
    )


def service_ids(settings: Settings) -> tuple[int, int]:
    """The user and group that the service becomes. Raises ConfigError."""
    wanted = settings.worker.user
    if wanted == "auto":
        try:
            entry = pwd.getpwnam(SERVICE_USER)
        except KeyError:
            sandbox, worker = settings.sandbox, settings.worker
            ranges = worker.max_concurrent_jobs + sandbox.spares
            alone = sandbox.first_uid + ranges * IDS_PER_JOB
            return alone, alone
        return entry.pw_uid, entry.pw_gid
    if wanted.isascii() and wanted.isdigit():
        if not 0 < int(wanted) < (1 << 32) - 2:
            raise ConfigError(
                f"cannot run the service as user {wanted}: it must not be root",
                remedy="set worker.user to an unprivileged user, or to 'auto'",
            )
        return int(wanted), int(wanted)
    try:
        entry = pwd.getpwnam(wanted)
    except KeyError:
        raise ConfigError(
            f"cannot run the service as user {wanted!r}: there is no such user",
            remedy=f"make it (useradd --system {wanted}) or set worker.user to 'auto'",
        ) from None
    if entry.pw_uid == 0:
        raise ConfigError(
            f"cannot run the service as user {wanted!r}: it must not be root",
            remedy="set worker.user to an unprivileged user, or to 'auto'",
        )
    return entry.pw_uid, entry.pw_gid


@contextmanager
def _state_errors(state: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"cannot use worker.state_dir {state}: {error.strerror} ({error.filename})",
            remedy="name a directory that root owns and only root may write to",
        ) from error


def spool_directory(settings: Settings) -> Path:
    """Where output is kept."""
    return Path(settings.worker.state_dir) / "service" / "spool"


def _make_state(state: Path, uid: int, gid: int) -> int:
    """Make what is missing of the state directory and lock it: the lock's descriptor."""
    with _state_errors(state):
        state.mkdir(mode=0o755, parents=True, exist_ok=True)
        status = state.stat(follow_symlinks=False)
        if status.st_uid != 0 or status.st_mode & 0o022:
            raise ConfigError(
                f"cannot use worker.state_dir {state}: others than root may write to it",
                remedy=f"chown root {state}; chmod 755 {state}",
            )
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        lock = os.open(state / "lock", flags, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise ConfigError(
                f"cannot use worker.state_dir {state}: another service is running with it",
                remedy="stop that service, or give this one a state_dir of its own",
            ) from None
        try:
            for name, mode in (("stage", 0o700), ("scratch", 0o700)):
                (state / name).mkdir(mode=mode, exist_ok=True)
            for own in (state / "service", state / "service" / "spool"):
                own.mkdir(mode=0o700, exist_ok=True)
                os.chown(own, uid, gid, follow_symlinks=False)
        except BaseException:
            os.close(lock)
            raise
    return lock


def listen(address: str, port: int) -> tuple[socket.socket, ...]:
    """Listening sockets for every address that `address` stands for."""
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise AddressUnavailable(
            f"cannot listen at {address!r}: {error}",
            remedy="set server.address to an address of this host, such as 0.0.0.0",
        ) from None
    listeners: list[socket.socket] = []
    try:
        for family, kind, protocol, _, where in found:
            listener = socket.socket(family, kind, protocol)
            listeners.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(where)
            listener.listen(BACKLOG)
            listener.setblocking(False)
    except OSError as error:
        for listener in listeners:
            listener.close()
        remedies = {
            errno.EADDRINUSE: "stop what listens there, or choose another server.port",
            errno.EADDRNOTAVAIL: "set server.address to an address of this host",
        }
        raise AddressUnavailable(
            f"cannot listen at {address}:{port}: {os.strerror(error.errno or 0)}",
            remedy=remedies.get(error.errno or 0, "choose another server.address or server.port"),
        ) from None
    return tuple(listeners)


def _give_up_root(uid: int, gid: int) -> None:
    """Become the unprivileged user, for good; with room for the descriptors of many clients."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    for name in _LATE_IMPORTS:
        importlib.import_module(name)
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    sc.prctl(sc.PR_SET_NO_NEW_PRIVS, 1)
    os.umask(0o77)
    if 0 in (*os.getresuid(), *os.getresgid()):
        raise JobworkerError("cannot give up root")
