"""Whether all disks that jobs may have at a time could be filled, where the service keeps them.

A host may promise more than it has: most jobs fill little of their disks. Where all fill them,
writes are lost and jobs FAIL by that, so an administrator is told beforehand.
"""

import logging
import os
from pathlib import Path

import trio

from jobworker.config import MEBIBYTE, Settings
from jobworker.errors import ConfigError, JobworkerError
from jobworker.jobs.budget import OutputBudget
from jobworker.model.units import format_size
from jobworker.sandbox.link import Link
from jobworker.threads import in_thread

log = logging.getLogger("jobworker.server")

LOOK_SECONDS = 1.0


def promised_bytes(settings: Settings) -> int:
    """What the disks of all jobs that run at a time, and what is to stay free, come to."""
    worker, sandbox = settings.worker, settings.sandbox
    return (worker.max_concurrent_jobs * sandbox.disk_limit + worker.keep_free) * MEBIBYTE


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


async def follow_promises(link: Link, budget: OutputBudget) -> None:
    """Keep the budget of output informed of what live jobs' disks may still take; never returns."""
    while True:
        try:
            promised = await link.promised_bytes()
            await in_thread(budget.promise, promised)
        except JobworkerError as error:
            log.debug("%s", error)
        await trio.sleep(LOOK_SECONDS)
