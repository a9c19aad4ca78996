"""`worker prune`: retention on this host, in a process of its own, whether the service runs or not.

Locks on the files say what is in use (see `retention`). A directory `7.removed` is left for
each job: the service finds it at its start, when it applies its policy or looks at the job, notes
the removal in the job's record and takes the directory away.
"""

from pathlib import Path

from jobworker.config.settings import Settings, load
from jobworker.errors import ConfigError, OutputError
from jobworker.jobs.age_clock import FILE, AgeClock
from jobworker.jobs.retention import KeptOutput, Policy
from jobworker.model.units import format_size
from jobworker.server.service import retention_policy
from jobworker.server.setup import spool_directory


def prune_here(
    config: Path | None, *, older_than: float | None, keep: int | None, max_size: int | None
) -> str:
    """Prune as the options ask (else the configuration); what to say of it. Raises ConfigError."""
    settings = Settings() if config is None else load(config)
    policy = retention_policy(settings)
    if (older_than, keep, max_size) != (None, None, None):
        policy = Policy(max_age_seconds=older_than, max_jobs=keep, max_bytes=max_size)
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
    ages.begin(kept.newest_ns)
    gone = kept.prune(policy)
    size = format_size(sum(each.size for each in gone))
    return f"removed the output of {len(gone)} jobs, {size}"
