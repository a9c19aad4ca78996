"""Recovery: the spool directory put in order after a service that died.

Output of jobs that were never recorded goes (the service died between the two); what belongs to
jobs that died with the service is sealed, so that it can be read to its end.
"""

import logging
import shutil
from pathlib import Path

import trio

from jobworker.errors import JobworkerError
from jobworker.jobs.history import History
from jobworker.jobs.spool import Spool

log = logging.getLogger("jobworker.jobs")


async def recover_output(spools: Path, history: History) -> None:
    """Put the spool directory in order after an earlier service: seal what it left open.

    Directories of jobs that were never recorded (the service died between the two) go.
    """

    def remove_unrecorded() -> None:
        for entry in spools.iterdir():
            if entry.name.isdigit() and int(entry.name) >= history.next_id:
                shutil.rmtree(entry)

    await trio.to_thread.run_sync(remove_unrecorded)
    for job in history.lost:
        try:
            spool = await trio.to_thread.run_sync(Spool.open, spools / str(job))
        except JobworkerError as error:
            log.warning("job %d: its output is lost: %s", job, error)
            continue
        try:
            await spool.seal()
        finally:
            spool.close()
