"""Whether all disks that jobs may have at a time could be filled, where the service keeps them.

A host may promise more than it has: most jobs fill little of their disks. Where all fill them,
writes are lost and jobs FAIL by that, so an administrator is told beforehand.
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
from jobworker.sandbox.service.link import Link
from jobworker.threads import in_thread

log = logging.getLogger("jobworker.server")

LOOK_SECONDS = 1.0


def promised_bytes(settings: Settings) -> int:
    """What the disks of all jobs that run at a time, and what is to stay free, come to."""
    return disks_bytes(settings) + settings.worker.keep_free * MEBIBYTE


def disks_bytes(settings: Settings) -> int:
    """What the disks of all jobs that run at a time come to, if each asks for what is usual."""
    return settings.worker.max_concurrent_jobs * settings.sandbox.disk_limit * MEBIBYTE


def free_bytes(directory: Path) -> int:
    """What an unprivileged user may still take of the file system that holds a directory."""
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def check_promises(settings: Settings, directory: Path) -> str:
    """Say by what the disks of jobs are covered. Raises ConfigError where they are not."""
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
    """What is to be logged of that at the start."""
    try:
        check_promises(settings, directory)
    except ConfigError as error:
        return (str(error),)
    return ()


@define(eq=False, kw_only=True)
class DiskPromises:
    """What live jobs' disks may still take of the disk below them, and whether it has that."""

    _link: Link
    _directory: Path
    _budget: OutputBudget | None
    """Of output, which is to leave room for the disks; None where it shall not."""
    _most: int
    """Output leaves no more than this: the settings have room for it, and it is not known whether
    the host has any for larger disks, which clients may ask for as they like."""
    shortfall: str = field(default="", init=False)
    """What is to be said to those whose jobs run; "" where all can be written."""

    async def follow(self) -> None:
        """Look again and again; never returns."""
        while True:
            try:
                promised = await self._link.promised_bytes()
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
