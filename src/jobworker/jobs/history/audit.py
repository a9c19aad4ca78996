"""The audit log's rows: which client did what, when, and with what outcome. Rows never change.

Every row stands twice: in the history's table, which refuses changes (`history.schema`), and as a
line of JSON in audit.jsonl beside the history, which other programs can follow and copy. The lines
are plain ASCII, whatever characters a name contains. So no name can forge a second line or move a
terminal's cursor.
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
_BLOCK_BYTES = 4096


@frozen(kw_only=True)
class AuditRow:
    """One action of a client or of the service, or an attempt at one."""

    at: datetime
    name: str = ""
    """The CN of the client's certificate; "" if there was none."""
    serial: str = ""
    role: str = ""
    peer: str = ""
    """The client's ADDRESS:PORT."""
    action: str
    """The name of a wire method, or a name that begins with `connection.` or `service.`."""
    job: int | None = None
    outcome: str
    """`ok`, or the name of an error."""
    detail: str = ""

    def values(self) -> tuple[str | int | None, ...]:
        """The values of the table's columns, in their order."""
        return (_moment(self.at), *map(_sound, attrs.astuple(self)[1:]))

    def line(self) -> str:
        """The line of the file: JSON in ASCII, with a line feed."""
        return json.dumps({**attrs.asdict(self), "at": _moment(self.at)}) + "\n"


_COLUMNS = ", ".join(attribute.name for attribute in attrs.fields(AuditRow))
_INSERT = (
    f"INSERT INTO audit ({_COLUMNS}) "  # noqa: S608 - our own names
    f"VALUES ({', '.join('?' * len(attrs.fields(AuditRow)))})"
)


def _sound(value: str | int | None) -> str | int | None:
    """A value that SQLite can store: lone surrogates, which are no text, become escapes."""
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    return value


def _moment(at: datetime) -> str:
    return at.astimezone(UTC).isoformat(timespec="microseconds")


def insert_rows(rows: Sequence[AuditRow], connection: apsw.Connection) -> None:
    """Add rows to the table, within the caller's transaction. Raises apsw.Error."""
    connection.executemany(_INSERT, [row.values() for row in rows])


def append_lines(path: Path, rows: Sequence[AuditRow]) -> None:
    """Append a line for each row to the file, and make the file if it is missing. Raises OSError.

    Only whole lines stay. If the disk takes only a part of a line, this function cuts that part off
    again. It also cuts off a part that a killed service left. The lines before it stay, and the
    table has all rows. The file is opened each time, so a program that rotates it need not notify
    the service.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    with open(os.open(path, flags, 0o600), "r+b", buffering=0) as file:
        _cut_half_line(file.fileno())
        data = memoryview("".join(row.line() for row in rows).encode("ascii"))
        try:
            while data:
                data = data[os.write(file.fileno(), data) :]
        except OSError:
            _cut_half_line(file.fileno())
            raise


def _cut_half_line(fd: int) -> None:
    """Truncate the file after its last line feed."""
    end = os.fstat(fd).st_size
    place = end
    while place:
        start = max(0, place - _BLOCK_BYTES)
        line_feed = os.pread(fd, place - start, start).rfind(b"\n")
        if line_feed >= 0:
            place = start + line_feed + 1
            break
        place = start
    if place < end:
        os.ftruncate(fd, place)


def read_rows(
    history: Path,
    *,
    since: datetime | None = None,
    name: str | None = None,
    job: int | None = None,
    limit: int,
) -> list[AuditRow]:
    """Return the latest `limit` rows that fit, oldest first. A service may be writing meanwhile.

    `history`: the path of the database. `since`: rows of this time or later. `name`, `job`: only
    rows of this client, of this job. Raises ConfigError if the table cannot be read.
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
            remedy="use the configuration of the service that wrote it; it must have run once",
        ) from None


def _row(values: Sequence[object]) -> AuditRow:
    named = dict(zip((a.name for a in attrs.fields(AuditRow)), values, strict=True))
    return AuditRow(**{**named, "at": datetime.fromisoformat(str(named["at"]))})  # type: ignore[arg-type]
