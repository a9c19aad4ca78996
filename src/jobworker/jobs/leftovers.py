"""Removes, when a service starts, what is left of jobs that were removed or refused.

There are two kinds. A client may have removed a job while its output was missing, for instance
because the disk was not mounted. The history has recorded that (`History.mark_output_missing`), and
if the output is back, it is removed now. And an earlier service may have refused a job to its
client, and ended before it could remove what it had made of the job. The job's note says so
(`history.job_note`). Neither kind is adopted.
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
    """Remove all that is left of jobs that were removed or refused. Returns their ids.

    `unknown`: jobs that the history does not know. `unfinished`: jobs that have not ended by the
    history. The function looks for leftovers among both. Raises InternalError if the history
    refuses, and JobworkerError if the launcher does.
    """
    refused = await in_thread(refused_of, spools, [*unknown, *unfinished])
    removed = await history.removed_without_output(frozenset(unknown) - refused)
    for job in sorted(refused | removed):
        if job in launcher.inherited:
            await have_forgotten(launcher, job)
        if job in unfinished:  # the record may have reached the disk though its write had failed
            await history.remove(job)
    await in_thread(_remove_output_of, spools, refused, "refused", "and stood there still")
    await in_thread(_remove_output_of, spools, removed, "removed", "while its output was missing")
    return refused | removed


def refused_of(spools: Path, jobs: Collection[JobId]) -> frozenset[JobId]:
    """Those of the jobs whose notes say that the service has refused them. Blocks."""
    return frozenset(job for job in jobs if was_refused(spools, job))


def _remove_output_of(spools: Path, jobs: Collection[JobId], what: str, when: str) -> None:
    for job in sorted(jobs):
        directory = spools / str(job)
        try:
            if os.path.lexists(directory):  # if not, only its mark is left
                remove_output(directory, force=True, ended=True)
            clear_mark(directory)
        except JobworkerError as error:
            log.warning("job %d was %s, but its output in %s stays: %s", job, what, spools, error)
        else:
            log.warning("job %d was %s %s: its output is removed now", job, what, when)
