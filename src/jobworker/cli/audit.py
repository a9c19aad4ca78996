"""`worker audit`: who did what, when, and what came of it, read from the service's history.

It reads the file itself, so it works while the service runs and when it does not; who may read that
file may read the log.
"""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import asyncclick as click

from jobworker.cli.console import say
from jobworker.cli.failures import one_line as visible
from jobworker.cli.parameters import Count, Filled, JobNumber, Moment, config_option
from jobworker.errors import ConfigError

if TYPE_CHECKING:
    from jobworker.jobs.history.audit import AuditRow


@click.command()
@config_option
@click.option(
    "--since",
    type=Moment(),
    metavar="TIME|DURATION",
    help="Only what came later: 10m, 2026-01-31T12:00 (local time where no zone is named).",
)
@click.option(
    "--who", type=Filled(), metavar="NAME", help="Only what certificates of this name did."
)
@click.option("--job", type=JobNumber(), help="Only what was done to this job.")
@click.option(
    "--limit",
    type=Count(min=1),
    default=1000,
    show_default=True,
    metavar="N",
    help="At most so many, the latest.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, for programs.")
def audit(
    config: Path | None,
    since: datetime | timedelta | None,
    who: str | None,
    job: int | None,
    limit: int,
    as_json: bool,
) -> None:
    """Tell who did what, oldest first: runs, stops, reads of output, and all that was refused."""
    from jobworker.config.settings import Settings, load
    from jobworker.jobs.history.audit import read_rows

    if isinstance(since, timedelta):
        since = datetime.now(UTC) - since
    settings = Settings() if config is None else load(config)
    history = Path(settings.worker.state_dir) / "service" / "history.db"
    _become_owner(history.parent)
    for row in read_rows(history, since=since, name=who, job=job, limit=limit):
        say(row.line().rstrip("\n") if as_json else _line(row))


def _become_owner(directory: Path) -> None:
    """Give root up: what the service may write to is not for root to open.

    Raises ConfigError where the owner cannot be seen.
    """
    if os.geteuid() != 0:
        return
    try:
        status = directory.stat()
    except (FileNotFoundError, NotADirectoryError):
        return  # the reader of the log says so
    except OSError as error:
        raise ConfigError(
            f"cannot read the audit log in {directory}: {error.strerror}",
            remedy="name the configuration of the service that wrote it, with --config",
        ) from None
    os.setgroups([])
    os.setresgid(status.st_gid, status.st_gid, status.st_gid)
    os.setresuid(status.st_uid, status.st_uid, status.st_uid)


def _line(row: "AuditRow") -> str:
    moment = row.at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    who = f"{row.name} ({row.role}, {row.serial})" if row.name else "-"
    words = [moment, row.peer or "-", who, row.action]
    if row.job is not None:
        words.append(f"job {row.job}")
    words.append(row.outcome)
    return visible(" ".join(words) + (f": {row.detail}" if row.detail else ""))
