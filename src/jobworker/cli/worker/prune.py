"""`worker prune`: apply retention in a process of its own, whether the service runs or not.

Locks on the files show which output is in use (see `retention`). For each job, such as job 7, the
program leaves a directory `7.removed`. The service finds it at its start, when it applies its
policy or when it reads the job's record. It records the removal and deletes the directory.
"""

from pathlib import Path

from jobworker.config.settings import Settings, load
from jobworker.errors import ConfigError, OutputError
from jobworker.jobs.age_clock import FILE, AgeClock
from jobworker.jobs.retention import KeptOutput
from jobworker.jobs.retention_policy import RetentionPolicy
from jobworker.jobs.sweep import prune
from jobworker.model.units import format_size
from jobworker.server.service import retention_policy
from jobworker.server.startup.preparation import spool_directory


def prune_here(
    config: Path | None, *, older_than: float | None, keep: int | None, max_size: int | None
) -> str:
    """Prune by the options, or without any by the configuration. Returns a line to print.

    Raises ConfigError if the directory of the output cannot be read.
    """
    settings = Settings() if config is None else load(config)
    policy = retention_policy(settings)
    if (older_than, keep, max_size) != (None, None, None):
        policy = RetentionPolicy(max_age_seconds=older_than, max_jobs=keep, max_bytes=max_size)
    spools = spool_directory(settings)
    ages = AgeClock(spools.with_name(FILE), keeps=False)
    kept = KeptOutput(spools, clock_ns=ages.now_ns)
    try:
        kept.load()
    except OutputError as error:
        why = error.__cause__.strerror if isinstance(error.__cause__, OSError) else error.message
        raise ConfigError(
            f"cannot prune {spools}: {why}",
            remedy="run it as root, with the configuration of a service that has run once",
        ) from None
    ages.begin(kept.last[0])
    gone = prune(kept, policy)
    size = format_size(sum(each.size for each in gone))
    return f"removed the output of {len(gone)} jobs, {size}"
