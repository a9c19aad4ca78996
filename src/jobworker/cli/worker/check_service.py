"""The findings of `worker check` about the service: its configuration, files, port and Python.

Each check calls the functions that `worker serve` calls at its start, and changes nothing.
"""

import fcntl
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from jobworker.config.settings import Settings
from jobworker.errors import ConfigError, JobworkerError
from jobworker.pki.credentials import SERVER_REMEDY
from jobworker.pki.expiry import WARN_BEFORE, expiry_warnings
from jobworker.pki.tls import key_mode_warning, server_context
from jobworker.sandbox.check.probing import Finding
from jobworker.sandbox.seccomp.compile import load_filters
from jobworker.sandbox.seccomp.program import INSTRUCTION_BYTES
from jobworker.server.connections.listening import bind, listen
from jobworker.server.host.copy_on_write import check_overwrites
from jobworker.server.host.descriptor_budget import outputs_within
from jobworker.server.host.disk_promises import check_promises
from jobworker.server.host.id_ranges import own_id
from jobworker.server.host.process_limits import descriptor_limit
from jobworker.server.host.service_user import service_ids
from jobworker.server.startup.configuration_reader import configured_files
from jobworker.server.startup.state_directory import holds

GROUP = "service"


def findings(settings: Settings) -> Iterator[Finding]:
    """Yield a finding for everything that the service of `settings` needs."""
    yield _try("python", _python)
    yield _try("history (apsw)", _history)
    yield _try("system-call profile", lambda: _profile(settings))
    yield _try("user", lambda: _user(settings))
    yield _try("descriptors", lambda: _descriptors(settings))
    running = _is_running(settings)
    yield _try("state directory", lambda: _state(settings, running=running))
    if os.geteuid() == 0:
        yield _try("room for jobs' disks", lambda: _room(settings), needed=False)
    yield _try("room for ends", lambda: _room_for_ends(settings), needed=False)
    yield _try("port", lambda: _port(settings, running=running))
    yield _try("certificates and key", lambda: _certificates(settings))
    yield _try("end of certificates", lambda: _terms(settings), needed=False)
    yield _try("mode of the key", lambda: _key_mode(settings), needed=False)


def _try(name: str, work: Callable[[], str], *, needed: bool = True) -> Finding:
    try:
        return Finding(GROUP, name, True, needed, work(), "")
    except JobworkerError as error:
        return Finding(GROUP, name, False, needed, error.message, error.remedy)
    except OSError as error:
        reason = f"{error.strerror} ({error.filename})" if error.filename else str(error)
        return Finding(GROUP, name, False, needed, reason, "")


def _python() -> str:
    return f"{platform.python_implementation()} {platform.python_version()}"


def _history() -> str:
    try:
        import apsw
    except ImportError as error:
        raise ConfigError(
            f"cannot keep a history: {error}", remedy="pip install 'jobworker[server]'"
        ) from None
    return f"SQLite {apsw.sqlite_lib_version()}"


def _profile(settings: Settings) -> str:
    path = settings.sandbox.seccomp_profile
    listed = len(load_filters(path).listed) // INSTRUCTION_BYTES
    return f"{path or 'the profile of the package'}, {listed} instructions"


def _user(settings: Settings) -> str:
    ids = service_ids(settings)
    if ids is None:
        uid = own_id(Path(settings.worker.state_dir))
        return f"uid {uid}, its own, without privileges"
    uid, gid = ids
    return f"uid {uid}, gid {gid}, without privileges"


def _descriptors(settings: Settings) -> str:
    limit = descriptor_limit()
    outputs = outputs_within(settings, limit)
    return f"{limit}: enough for all jobs and connections, and outputs of {outputs} ended jobs"


def _is_running(settings: Settings) -> bool:
    """Whether a service holds the lock of this state directory."""
    try:
        lock = os.open(Path(settings.worker.state_dir) / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def _state(settings: Settings, *, running: bool) -> str:
    state = Path(settings.worker.state_dir)
    holds(state)  # raises if the directory cannot be examined, as a start does
    there = nearest_directory(state)
    status = there.stat()
    if there == state and (status.st_uid != os.geteuid() or status.st_mode & 0o022):
        raise ConfigError(
            f"cannot use worker.state_dir {state}: others may write to it",
            remedy=f"chown {os.geteuid()} {state}; chmod 755 {state}",
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(
            f"cannot use worker.state_dir {state}: this user may not write to {there}",
            remedy="set worker.state_dir to a directory of this user's",
        )
    free = shutil.disk_usage(there).free >> 20
    use = "in use by a running service" if running else "" if there == state else "to be created"
    return ", ".join(filter(None, (str(state), use, f"{free} MiB free")))


def _room(settings: Settings) -> str:
    return check_promises(settings, nearest_directory(Path(settings.worker.state_dir)))


def _room_for_ends(settings: Settings) -> str:
    return check_overwrites(nearest_directory(Path(settings.worker.state_dir)))


def nearest_directory(path: Path) -> Path:
    """The directory `path`, or the nearest parent that exists and that this user can see."""
    return next((each for each in (path, *path.parents) if os.path.isdir(each)), Path("/"))


def _port(settings: Settings, *, running: bool) -> str:
    server = settings.server
    if running and server.port:
        return f"{server.address}:{server.port}, in use by the running service"
    listeners = bind(server.address, server.port)
    try:
        listen(listeners)
    finally:
        for listener in listeners:
            listener.close()
    return f"{server.address}:{server.port}, free"


def _certificates(settings: Settings) -> str:
    security = settings.security
    server_context(configured_files(security), min_version=security.min_tls_version)
    return f"{security.server_cert}, TLS {security.min_tls_version} and newer"


def _terms(settings: Settings) -> str:
    files = configured_files(settings.security)
    if warnings := expiry_warnings(files, datetime.now(UTC)):
        warning, _, remedy = "; ".join(warnings).rpartition("; ")
        raise ConfigError(warning, remedy=remedy)
    return f"none soon: a third of the time is left, or {WARN_BEFORE.days} days"


def _key_mode(settings: Settings) -> str:
    key = Path(settings.security.server_key)
    try:
        mode = key.stat().st_mode & 0o777
    except OSError as error:
        raise ConfigError(
            f"cannot examine the key {key}: {error.strerror}", remedy=SERVER_REMEDY
        ) from None
    if warning := key_mode_warning(key):
        raise ConfigError(warning)
    return f"{mode:04o}"
