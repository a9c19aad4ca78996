"""A check whether the host has room for all disks that jobs may have at a time, if all are filled.

A host may promise more than it has (overcommit), since most jobs fill little of their disks. If all
jobs fill them, writes are lost and those jobs are FAILED. So the service warns the administrator
beforehand.
"""

import logging
import os
from pathlib import Path

import trio
from attrs import define, field

from jobworker.config.settings import Settings
from jobworker.errors import ConfigError, JobworkerError
from jobworker.jobs.output.budget import OutputBudget
from jobworker.model.units import MEBIBYTE, format_size
from jobworker.sandbox.service.launcher_client import LauncherClient
from jobworker.threads import in_thread

log = logging.getLogger("jobworker.server")

LOOK_SECONDS = 1.0


def promised_bytes(settings: Settings) -> int:
    """The bytes that the disks of all running jobs may take, plus those that must stay free."""
    return disks_bytes(settings) + settings.worker.keep_free * MEBIBYTE


def disks_bytes(settings: Settings) -> int:
    """The bytes that the disks of all running jobs may take, if each has the default size."""
    return settings.worker.max_concurrent_jobs * settings.sandbox.disk_limit * MEBIBYTE


def free_bytes(directory: Path) -> int:
    """The free bytes of a directory's file system that an unprivileged user may take."""
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def check_promises(settings: Settings, directory: Path) -> str:
    """A line for `worker check` with promised and free bytes.

    Raises ConfigError if the host has less than it promises to jobs' disks.
    """
    promised, free = promised_bytes(settings), free_bytes(directory)
    if promised <= free:
        return f"{format_size(promised)} at most, {format_size(free)} free"
    worker, sandbox = settings.worker, settings.sandbox
    jobs, each = worker.max_concurrent_jobs, format_size(sandbox.disk_limit * MEBIBYTE)
    what = f"the disks of {jobs} jobs may take {each} each, and {format_size(free)} are free there"
    if sandbox.overcommit_disk:
        raise ConfigError(
            f"cannot cover what jobs may write: {what}; a job whose writes are lost is FAILED",
            remedy="lower sandbox.disk_limit or worker.max_concurrent_jobs, or set "
            "sandbox.overcommit_disk to false to have jobs refused instead",
        )
    raise ConfigError(
        f"cannot reserve the disks of all jobs: {what}; a job without room is refused",
        remedy="lower sandbox.disk_limit or worker.max_concurrent_jobs",
    )


def promise_warnings(settings: Settings, directory: Path) -> tuple[str, ...]:
    """The warnings of `check_promises` that the service logs at its start."""
    try:
        check_promises(settings, directory)
    except ConfigError as error:
        return (str(error),)
    return ()


@define(eq=False, kw_only=True)
class DiskPromises:
    """Follows how much live jobs' disks may still take, and whether the host's disk has that."""

    _launcher: LauncherClient
    _directory: Path
    _budget: OutputBudget | None
    """The budget of output that must leave room for the disks; None if output need not."""
    _most: int
    """Output leaves at most so many bytes: the settings have room for these. Clients may ask for
    larger disks as they like, and the host may have no room for those."""
    shortfall: str = field(default="", init=False)
    """A warning for clients whose jobs run; "" if the host has room for all their writes."""

    async def follow(self) -> None:
        """Compare promised and free bytes every `LOOK_SECONDS`; never returns."""
        while True:
            try:
                promised = await self._launcher.promised_bytes()
                await in_thread(self._look, promised)
            except JobworkerError as error:
                log.debug("%s", error)
            await trio.sleep(LOOK_SECONDS)

    def _look(self, promised: int) -> None:
        if self._budget is not None:
            self._budget.promise(min(promised, self._most))
        try:
            free = free_bytes(self._directory)
        except OSError as error:
            log.debug("%s: %s", self._directory, error.strerror)
            return
        self.shortfall = (
            f"the host has {format_size(free)} free for {format_size(promised)} that live jobs "
            "may still write to their disks; a job whose writes are lost is FAILED"
            if promised > free
            else ""
        )
