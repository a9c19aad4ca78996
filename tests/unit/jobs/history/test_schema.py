"""The history's tables, and the steps from older ones."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import apsw
import pytest

from jobworker.errors import ConfigError
from jobworker.jobs.history import schema
from jobworker.jobs.history.schema import APPLICATION_ID, MIGRATIONS, check_file, migrate
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


@contextmanager
def connected(path: Path) -> Iterator[apsw.Connection]:
    with closing(apsw.Connection(str(path))) as connection:
        yield connection


def test_new_file_gets_all_steps_and_its_number_once(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with connected(path) as connection:
        migrate(connection, path)
        assert connection.pragma("user_version") == len(MIGRATIONS)
        assert connection.pragma("application_id") == APPLICATION_ID
        tables = connection.execute("SELECT count(*) FROM sqlite_master").get
        migrate(connection, path)
        assert connection.execute("SELECT count(*) FROM sqlite_master").get == tables
    assert "bringing the history" not in caplog.text


def test_step_that_fails_leaves_the_version_before_it(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    torn = "CREATE TABLE half (id); SELECT no_such_function();"
    with connected(path) as connection:
        with monkeypatch.context() as patch:
            patch.setattr(schema, "MIGRATIONS", (*MIGRATIONS[:2], torn))
            with pytest.raises(apsw.SQLError, match="no_such_function"):
                migrate(connection, path)
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        assert connection.pragma("user_version") == 2
        query = "SELECT count(*) FROM sqlite_master WHERE name = 'half'"
        assert connection.execute(query).get == 0
        migrate(connection, path)
        assert connection.pragma("user_version") == len(MIGRATIONS)
    assert f"from version 2 to {len(MIGRATIONS)}" in caplog.text


@pytest.mark.parametrize(
    "script",
    [
        "CREATE TABLE jobs (id, state, owner, created_at, record);",
        "CREATE TABLE other (x);",
        "CREATE TABLE jobs (id, state, owner); PRAGMA user_version = 1;",
        "PRAGMA user_version = 1;",
        "PRAGMA application_id = 7;",
        f"{MIGRATIONS[0]} PRAGMA user_version = 1; PRAGMA application_id = 7;",
    ],
)
def test_database_of_another_program_is_refused_and_left_alone(path: Path, script: str) -> None:
    with connected(path) as connection:
        connection.execute(script)
        connection.execute("CREATE TABLE IF NOT EXISTS more (x); DROP TABLE more")
        before = path.read_bytes()
        with pytest.raises(ConfigError, match="a database of another program"):
            migrate(connection, path)
        assert path.read_bytes() == before


def test_history_without_its_number_is_one_of_the_first_versions(path: Path) -> None:
    with connected(path) as connection:
        migrate(connection, path)
        connection.pragma("application_id", 0)
        migrate(connection, path)
        assert connection.pragma("application_id") == APPLICATION_ID


def test_newer_version_is_told_by_its_number_and_not_as_damaged(path: Path) -> None:
    with connected(path) as connection:
        migrate(connection, path)
        connection.pragma("user_version", len(MIGRATIONS) + 1)
        with pytest.raises(ConfigError, match=f"version {len(MIGRATIONS) + 1},"):
            check_file(connection, path)


@pytest.mark.parametrize("is_large", [True, False])
def test_damaged_page_is_found_at_the_start_unless_the_file_is_large(
    path: Path, monkeypatch: pytest.MonkeyPatch, is_large: bool
) -> None:
    with connected(path) as connection:
        migrate(connection, path)
        connection.execute("BEGIN")
        for number in range(1, 2000):
            row = (number, "COMPLETED", "alice", "2026", f'{{"x":"{"y" * 90}"}}')
            connection.execute("INSERT INTO jobs VALUES (?, ?, ?, ?, ?)", row)
        connection.execute("COMMIT")
    size = path.stat().st_size
    with path.open("r+b") as file:  # the last pages are of the tables and indexes
        file.seek(size - 3 * 4096)
        file.write(b"\x55" * 3 * 4096)
    monkeypatch.setattr(schema, "_CHECKED_BYTES", size - is_large)
    with connected(path) as connection:
        if is_large:
            check_file(connection, path)
        else:
            with pytest.raises(ConfigError, match="it is damaged") as refused_:
                check_file(connection, path)
            assert "put a copy back" in refused_.value.remedy
