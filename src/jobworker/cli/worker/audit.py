"""`worker audit`: print the audit log (who did what, when, with what result) from the history.

The command reads the file of the history itself, so it works with or without a running service. A
user who may read that file may read the audit log.
"""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import asyncclick as click

from jobworker.cli.command_line.failures import one_line as visible
from jobworker.cli.command_line.failures import print_text
from jobworker.cli.command_line.parameters import (
    Count,
    JobNumber,
    Moment,
    NonEmptyText,
    config_option,
)
from jobworker.errors import ConfigError

if TYPE_CHECKING:
    from jobworker.jobs.history.audit import AuditRow


@click.command()
@config_option
@click.option(
    "--since",
    type=Moment(),
    metavar="TIME|DURATION",
    help="Only entries after this time: 10m, 2026-01-31T12:00 (local time unless a zone is given).",
)
@click.option(
    "--who",
    type=NonEmptyText(),
    metavar="NAME",
    help="Only entries of certificates with this name.",
)
@click.option("--job", type=JobNumber(), help="Only entries about this job.")
@click.option(
    "--limit",
    type=Count(min=1),
    default=1000,
    show_default=True,
    metavar="N",
    help="At most N entries, the latest.",
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
    """Print who did what, oldest first: runs, stops, reads of output, and all refused requests."""
    from jobworker.config.settings import Settings, load
    from jobworker.jobs.history.audit import read_rows

    if isinstance(since, timedelta):
        since = datetime.now(UTC) - since
    settings = Settings() if config is None else load(config)
    history = Path(settings.worker.state_dir) / "service" / "history.db"
    _become_owner(history.parent)
    for row in read_rows(history, since=since, name=who, job=job, limit=limit):
        print_text(row.line().rstrip("\n") if as_json else _line(row))


def _become_owner(directory: Path) -> None:
    """Change from root to the owner of `directory`: root must not open files of the service.

    Raises ConfigError if the owner cannot be determined.
    """
    if os.geteuid() != 0:
        return
    try:
        status = directory.stat()
    except (FileNotFoundError, NotADirectoryError):
        return  # `read_rows` reports the missing file
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
