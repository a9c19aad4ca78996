"""The user and group that the service becomes when it gives up root, from `worker.user`."""

import os
import pwd
from contextlib import suppress

from jobworker.config.settings import Settings
from jobworker.errors import ConfigError
from jobworker.sandbox.service.launch import OpenedLauncher
from jobworker.sandbox.user_namespaces import IDS_PER_JOB
from jobworker.server.host.id_ranges import IdRange, job_ids

SERVICE_USER = "jobworker"


def service_ids(settings: Settings, jobs: IdRange | None = None) -> tuple[int, int] | None:
    """The user and group that the service becomes; None stands for an id of its own.

    `jobs` are the ids that the launcher gives to jobs, if it runs already: they may differ from
    those of `settings`. Raises ConfigError.
    """
    wanted = settings.worker.user
    if os.geteuid() != 0:
        return _own_ids(wanted)
    is_known = jobs is not None or settings.sandbox.first_uid > 0  # else a free range, chosen later
    jobs = jobs or job_ids(settings)
    ids = _wanted_ids(wanted)
    if is_known and ids is not None and ids[0] in jobs:
        raise ConfigError(
            f"cannot run the service as user {wanted}: jobs have the ids {jobs.first} to "
            f"{jobs.last}",
            remedy="set worker.user to another user or to 'auto', or sandbox.first_uid to ids that "
            "no user has",
        )
    return ids


def launcher_ids(launcher: OpenedLauncher) -> IdRange:
    """The ids of a launcher's jobs; the launcher may have been started with older settings."""
    first, jobs, spares = (launcher.policy[key] for key in ("first_uid", "max_jobs", "spares"))
    assert isinstance(first, int)
    assert isinstance(jobs, int)
    assert isinstance(spares, int)
    return IdRange(first, first + (jobs + spares) * IDS_PER_JOB - 1)


def _wanted_ids(wanted: str) -> tuple[int, int] | None:
    if wanted == "auto":
        try:
            entry = pwd.getpwnam(SERVICE_USER)
        except KeyError:
            return None
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


def _own_ids(wanted: str) -> tuple[int, int]:
    """This process's user and group. Raises ConfigError if `worker.user` names another user."""
    own = os.geteuid()
    names = {"auto", str(own)}
    with suppress(KeyError):
        names.add(pwd.getpwuid(own).pw_name)
    if wanted not in names:
        raise ConfigError(
            f"cannot run the service as user {wanted!r}: only root can become another user",
            remedy="start it as root or as that user, or set worker.user to 'auto'",
        )
    return own, os.getegid()
