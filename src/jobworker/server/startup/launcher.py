"""The preparation of `worker launcher`: makes the launcher's socket and policy, then executes it.

The launcher itself uses the standard library alone (`sandbox.launcher.main`). So the work that
needs more is done here: reading the settings, finding the service's user. Then this process
executes the launcher in its own place. The policy waits for the launcher in a socket, together with
the descriptors that it needs: the locks on the state directory and on the jobs' ids, the listener,
and the socket to its supervisor (systemd).
"""

import os
import socket
import stat
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from jobworker.config.settings import Settings, with_first_uid
from jobworker.errors import ConfigError, HostUnsupported
from jobworker.sandbox import channel
from jobworker.sandbox.cgroup.hierarchy import step_into_leaf
from jobworker.sandbox.log import log_line
from jobworker.sandbox.protocol.policy import policy_message
from jobworker.sandbox.service.launch import launcher_command
from jobworker.server.host.id_ranges import lock_ids
from jobworker.server.host.process_limits import lift_file_size_limit
from jobworker.server.host.service_user import service_ids
from jobworker.server.reporting.notify import Notifier
from jobworker.server.startup.preparation import policy_for
from jobworker.server.startup.state_directory import lock_for_launcher, make_state_directory

BACKLOG = 8


def become_launcher(settings: Settings) -> NoReturn:
    """Run a launcher for `settings` in this process's place. Raises JobworkerError."""
    if os.geteuid() != 0:
        raise HostUnsupported(
            "cannot run the launcher: jobs need namespaces and control groups, which root alone "
            "may make",
            remedy="run it as root",
        )
    path = settings.launcher.socket
    if not path:
        raise ConfigError(
            "cannot run the launcher: no socket is set for it to listen at",
            remedy="give --socket=PATH, or set launcher.socket in the configuration",
        )
    service_ids(settings)  # raises if there is no such user
    if small_files := lift_file_size_limit():
        log_line(small_files)
    state = Path(settings.worker.state_dir)
    make_state_directory(state)
    step_into_leaf()
    passed = {"lock": lock_for_launcher(state, 1.0)}
    ids = lock_ids(settings)
    passed["ids"] = ids.descriptor
    settings = with_first_uid(settings, ids.first)
    uid, gid = service_ids(settings) or (0, 0)  # root: such a service connects before it has its id
    passed["listener"] = _listen(path, uid, gid)
    notifier = Notifier()
    if notifier.fault:
        log_line(notifier.fault)
    if notifier.descriptor is not None:
        passed["notify"] = notifier.descriptor
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    message: channel.Message = {
        **policy_message(policy_for(settings, state)),
        "service_uid": uid,
        "carries": list(passed),
    }
    channel.send(near, message, list(passed.values()))
    far.set_inheritable(True)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir("/")
    command = launcher_command(far.fileno())
    os.execve(command[0], command, {})  # noqa: S606 - our own program


def _listen(path: str, uid: int, gid: int) -> int:
    """Listen at `path` for the service's user alone, and return the socket's descriptor.

    A socket that was there before is replaced: this process holds the state directory's lock, so no
    other launcher of this state directory listens there. Raises ConfigError.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        _check_directory(path)
        with suppress(FileNotFoundError):
            if not stat.S_ISSOCK(os.lstat(path).st_mode):
                raise ConfigError(
                    f"cannot listen at launcher.socket {path}: a file that is no socket is there",
                    remedy="move it away, or name another path",
                )
            os.unlink(path)
        before = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(before)
        os.chown(path, uid, gid, follow_symlinks=False)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen at launcher.socket {path}: {error.strerror or error}",
            remedy="name a path below a directory that exists and only root may write to",
        ) from error
    return listener.detach()


def _check_directory(path: str) -> None:
    """Raise ConfigError if users other than root may write to the socket's directory.

    Such a user could put another socket in its place.
    """
    directory = os.path.dirname(path)
    status = os.stat(directory)
    if status.st_uid != 0 or status.st_mode & 0o022:
        raise ConfigError(
            f"cannot listen at launcher.socket {path}: others than root may write to {directory}",
            remedy=f"name another directory, or: chown root {directory}; chmod 755 {directory}",
        )
