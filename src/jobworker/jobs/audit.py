"""The audit log's rows: who did what, when, and what came of it; written once, never changed.

Every row stands twice: in the history's table, which refuses change (`schema`), and as a line of
JSON in audit.jsonl beside it, which other programs can follow and carry away. The lines are plain
ASCII, whatever names hold: no name can forge a second line or move a terminal's cursor.
"""

import json
import os
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import apsw
import attrs
from attrs import frozen

from jobworker.errors import ConfigError

FILE = "audit.jsonl"


@frozen(kw_only=True)
class AuditRow:
    """One thing that somebody did, or tried to."""

    at: datetime
    name: str = ""
    """The certificate's CN; "" where there was none."""
    serial: str = ""
    role: str = ""
    peer: str = ""
    """ADDRESS:PORT."""
    action: str
    """A method's name, or `connection.…` or `service.…`."""
    job: int | None = None
    outcome: str
    """`ok`, or the name of an error."""
    detail: str = ""

    def values(self) -> tuple[str | int | None, ...]:
        """As the table has them."""
        return (_moment(self.at), *attrs.astuple(self)[1:])

    def line(self) -> str:
        """As the file has it."""
        return json.dumps({**attrs.asdict(self), "at": _moment(self.at)}) + "\n"


_COLUMNS = ", ".join(attribute.name for attribute in attrs.fields(AuditRow))
_INSERT = (
    f"INSERT INTO audit ({_COLUMNS}) "  # noqa: S608 - our own names
    f"VALUES ({', '.join('?' * len(attrs.fields(AuditRow)))})"
)


def _moment(at: datetime) -> str:
    return at.astimezone(UTC).isoformat(timespec="microseconds")


def insert_rows(connection: apsw.Connection, rows: Sequence[AuditRow]) -> None:
    """Add rows to the table, in one transaction. Raises apsw.Error."""
    with connection:
        connection.executemany(_INSERT, [row.values() for row in rows])


def append_lines(path: Path, rows: Sequence[AuditRow]) -> None:
    """Add lines to the file, which is made if it is missing. Raises OSError.

    It is opened each time: whoever rotates it need tell nobody.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    with open(os.open(path, flags, 0o600), "wb") as file:
        file.write("".join(row.line() for row in rows).encode("ascii"))


def read_rows(
    history: Path,
    *,
    since: datetime | None = None,
    name: str | None = None,
    job: int | None = None,
    limit: int,
) -> list[AuditRow]:
    """The latest `limit` rows of a history, oldest first, also while a service writes to it.

    Raises ConfigError.
    """
    wanted = [("at >= ?", _moment(since))] if since else []
    wanted += [] if name is None else [("name = ?", name)]
    conditions: list[tuple[str, str | int]] = [*wanted]
    if job is not None:
        conditions.append(("job = ?", job))
    where = " AND ".join(condition for condition, _ in conditions) or "1"
    query = f"SELECT {_COLUMNS} FROM audit WHERE {where} ORDER BY id DESC LIMIT ?"  # noqa: S608
    try:
        flags = apsw.SQLITE_OPEN_READONLY
        with closing(apsw.Connection(str(history), flags=flags)) as connection:
            connection.set_busy_timeout(5000)
            found = connection.execute(query, (*(value for _, value in conditions), limit))
            return [_row(values) for values in found][::-1]
    except apsw.Error as error:
        raise ConfigError(
            f"cannot read the audit log in {history}: {error}",
            remedy="is it the configuration of the service that wrote it? it must have run once",
        ) from None


def _row(values: Sequence[object]) -> AuditRow:
    named = dict(zip((a.name for a in attrs.fields(AuditRow)), values, strict=True))
    return AuditRow(**{**named, "at": datetime.fromisoformat(str(named["at"]))})  # type: ignore[arg-type]
