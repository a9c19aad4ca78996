"""The history's tables, and the steps from older ones."""

from contextlib import closing
from pathlib import Path

import apsw
import pytest

from jobworker.jobs.history.schema import MIGRATIONS
from jobworker.serialization.convert import unstructure
from jobworker.serialization.json_text import dumps

from ...strategies import record
from .histories import opened, path, refused

__all__ = ["path"]


@pytest.mark.parametrize("version", range(1, len(MIGRATIONS)))
async def test_older_file_keeps_its_jobs_and_becomes_one_of_today(path: Path, version: int) -> None:
    old = apsw.Connection(str(path))
    old.create_scalar_function("summary_of", lambda *_: None, 1)  # there are no records
    for script in MIGRATIONS[:version]:
        old.execute(script)
    old.pragma("user_version", version)
    kept = record(7, owner="bob")
    old.execute(
        "INSERT INTO jobs VALUES (7, ?, 'bob', '2026-01-31', ?)",
        (kept.state.value, dumps(unstructure(kept))),
    )
    old.close()
    with opened(path) as history:
        assert await history.get(kept.id) == kept
        assert history.next_id == 8
    with closing(apsw.Connection(str(path))) as today:
        assert today.pragma("user_version") == len(MIGRATIONS)


@pytest.mark.parametrize(
    "attempt",
    [
        "UPDATE audit SET outcome = 'ok'",
        "DELETE FROM audit",
        "INSERT OR REPLACE INTO audit SELECT id, at, 'x', '', '', '', '', NULL, '', '' FROM audit",
        "REPLACE INTO audit VALUES (1, '', '', '', '', '', '', NULL, '', '')",
    ],
)
def test_audit_table_takes_new_rows_and_nothing_else(path: Path, attempt: str) -> None:
    with opened(path):
        pass
    with closing(apsw.Connection(str(path))) as connection:
        row = "INSERT INTO audit VALUES (NULL, '2026', 'eve', '', '', '', 'x', NULL, 'denied', '')"
        connection.execute(row)
        with pytest.raises(apsw.ConstraintError, match="append-only"):
            connection.execute(attempt)
        assert connection.execute("SELECT name, outcome FROM audit").fetchall() == [
            ("eve", "denied")
        ]


def test_newer_schema_is_refused_and_left_alone(path: Path) -> None:
    with opened(path):
        pass
    connection = apsw.Connection(str(path))
    newer = len(MIGRATIONS) + 1
    connection.pragma("user_version", newer)
    error = refused(path)
    assert f"version {newer}," in error.message
    assert f"version {len(MIGRATIONS)};" in str(error)
    assert connection.pragma("user_version") == newer
    connection.close()
