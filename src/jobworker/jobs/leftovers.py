"""What is left of jobs that there are not, for a service that starts to remove.

A job may have been removed while its output was missing (its disk was not mounted, say): the
history keeps that (`history.mark_output_missing`), and the output that is back goes. And a client
may have been told that its job is refused before an earlier service could remove what it had made:
the job's note says so (`job_note`). Neither is adopted.
"""

import logging
import os
from collections.abc import Collection
from pathlib import Path

from jobworker.errors import JobworkerError
from jobworker.jobs.history.history import History
from jobworker.jobs.history.job_note import was_refused
from jobworker.jobs.inheritance import have_forgotten
from jobworker.jobs.output.directory import clear_mark
from jobworker.jobs.output.ended import remove_output
from jobworker.model.job import JobId
from jobworker.sandbox.service.launcher_client import LauncherClient
from jobworker.threads import in_thread

log = logging.getLogger("jobworker.jobs")


async def remove_leftovers(
    launcher: LauncherClient,
    history: History,
    spools: Path,
    *,
    unknown: Collection[JobId],
    unfinished: Collection[JobId],
) -> frozenset[JobId]:
    """Remove all that is left of jobs that there are not: which these are.

    They may be among those that the history does not know, and those that have not ended there.
    Raises InternalError.
    """
    refused = await in_thread(refused_of, spools, [*unknown, *unfinished])
    removed = await history.removed_without_output(frozenset(unknown) - refused)
    for job in sorted(refused | removed):
        if job in launcher.inherited:
            await have_forgotten(launcher, job)
        if job in unfinished:  # a disk that failed may have brought it back
            await history.remove(job)
    await in_thread(_remove_output_of, spools, refused, "refused", "and stood there still")
    await in_thread(_remove_output_of, spools, removed, "removed", "while its output was missing")
    return refused | removed


def refused_of(spools: Path, jobs: Collection[JobId]) -> frozenset[JobId]:
    """Those of the jobs whose clients were told that there is none. Waits for the disk."""
    return frozenset(job for job in jobs if was_refused(spools, job))


def _remove_output_of(spools: Path, jobs: Collection[JobId], what: str, when: str) -> None:
    for job in sorted(jobs):
        directory = spools / str(job)
        try:
            if os.path.lexists(directory):  # else its mark alone is left
                remove_output(directory, force=True, ended=True)
            clear_mark(directory)
        except JobworkerError as error:
            log.warning("job %d was %s, and what is in %s stays: %s", job, what, spools, error)
        else:
            log.warning("job %d was %s %s: that goes now", job, what, when)
