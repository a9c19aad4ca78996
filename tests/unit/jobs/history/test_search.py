"""Pages of the history: all that fit, in order, each in a bounded number of steps."""

from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import apsw
import pytest
import trio
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from jobworker.jobs.history import search as history_search
from jobworker.jobs.history.history import History
from jobworker.jobs.history.schema import MIGRATIONS
from jobworker.jobs.history.search import Filter, find_page
from jobworker.model.job import JobRecord, JobSpec, Limits
from jobworker.model.lifecycle import State
from jobworker.model.summary import summarize
from jobworker.serialization.convert import structure, unstructure
from jobworker.serialization.json_text import dumps, loads

from ...strategies import examples, record

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)


def put_all(path: Path, stored: list[JobRecord]) -> None:
    async def put() -> None:
        async with trio.open_nursery() as nursery:
            for each in stored:
                nursery.start_soon(history.put, each)

    history = History.open(path)
    try:
        trio.run(put)
    finally:
        history.close()


def all_pages(connection: apsw.Connection, wanted: Filter, limit: int) -> list[JobRecord]:
    """Ask until the end, as clients do."""
    found = list[JobRecord]()
    while True:
        page = find_page(wanted, limit, connection)
        assert len(page.records) <= limit
        found += [structure(JobRecord, loads(text)) for _, text in page.records]
        assert [each.id for each in found][-len(page.records) or len(found) :] == [
            number for number, _ in page.records
        ]
        if page.next is None:
            return found
        assert wanted.before is None or page.next < wanted.before
        wanted = evolve(wanted, before=page.next)


VALUES = st.sampled_from(["", "a", "b"])
SMALL = st.lists(
    st.builds(
        lambda state, owner, name, labels, words: (
            state,
            owner,
            JobSpec(command=("true", *words), name=name, labels=labels),
        ),
        st.sampled_from(State),
        st.sampled_from(["alice", "bob"]),
        VALUES,
        st.dictionaries(st.sampled_from(["x", "y"]), VALUES),
        st.lists(st.just("w" * 500), max_size=6),
    ),
    max_size=14,
)
FILTERS = st.builds(
    Filter,
    states=st.sampled_from([frozenset(State)]) | st.frozensets(st.sampled_from(State)),
    owner=st.none() | st.sampled_from(["alice", "bob", "carol"]),
    name=VALUES,
    labels=st.dictionaries(st.sampled_from(["x", "y"]), VALUES),
    before=st.none() | st.integers(1, 20),
)


@examples(max_examples=60)
@given(
    jobs=SMALL,
    wanted=st.lists(FILTERS, min_size=5, max_size=10),
    limit=st.integers(1, 6),
    steps=st.integers(1, 5),
    page_bytes=st.sampled_from([100, 3000, 1 << 20]),
)
def test_pages_hold_all_that_fit_newest_first(
    tmp_path_factory: pytest.TempPathFactory,
    jobs: list[tuple[State, str, JobSpec]],
    wanted: list[Filter],
    limit: int,
    steps: int,
    page_bytes: int,
) -> None:
    path = tmp_path_factory.mktemp("history") / "history.db"
    stored = [
        record(n, state, owner=owner, spec=spec)
        for n, (state, owner, spec) in enumerate(jobs, start=1)
    ]
    put_all(path, stored)
    with pytest.MonkeyPatch.context() as patch, closing(apsw.Connection(str(path))) as connection:
        patch.setattr(history_search, "MAX_STEPS", steps)
        patch.setattr(history_search, "MAX_PAGE_BYTES", page_bytes)
        for each in wanted:
            found = all_pages(connection, each, limit)
            assert found == [summarize(r) for r in reversed(stored) if each.fits(r)]


# --- the old schema, with many rows ---------------------------------------------------------

STATES = (State.COMPLETED, State.FAILED, State.STOPPED)


def old_record(number: int) -> JobRecord:
    """Every second one is of label x=a, every other one of y=b; few have variables or are long."""
    labels = {"x": "a"} if number % 2 else {"y": "b"}
    words = ("w" * 3000,) if number % 500 == 0 else ()
    return record(
        number,
        STATES[number % 3],
        owner="alice" if number % 10 else "bob",
        spec=JobSpec(
            command=("true", *words),
            name="rare" if number == 7 else "",
            labels={**labels, "number": str(number)},
            environment={"A": "é\n"} if number % 7 == 0 else {},
            secret_environment={"S": "***"} if number % 11 == 0 else {},
            limits=Limits(cpu_percent=50),
        ),
        ended_at=NOW,
        output_removed_at=NOW if number % 4 else None,
    )


def make_old_database(path: Path, count: int) -> None:
    with closing(apsw.Connection(str(path))) as old:
        for script in MIGRATIONS[:2]:
            old.execute(script)
        old.pragma("user_version", 2)
        with old:
            old.executemany(
                "INSERT INTO jobs VALUES (?, ?, ?, '2026-01-31', ?)",
                (
                    (n, r.state.value, r.owner, dumps(unstructure(r)))
                    for n, r in ((n, old_record(n)) for n in range(1, count + 1))
                ),
            )


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "history.db"
    make_old_database(path, 12_000)
    History.open(path).close()
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "history.db"
    make_old_database(path, 200)
    History.open(path).close()
    return path


def test_database_of_the_old_schema_keeps_every_record_and_finds_it(large: Path) -> None:
    history = History.open(large)

    async def look() -> None:
        for number in (1, 7, 11, 77, 500, 3500, 5500, 12_000):
            assert await history.get(old_record(number).id) == old_record(number)
            assert await history.summary(old_record(number).id) == summarize(old_record(number))
        kept = {n for n in range(1, 12_001) if n % 4 == 0}
        with_output = await history.with_output()
        assert with_output.keys() == kept
        bobs = {n for n, owner in with_output.items() if owner == "bob"}
        assert bobs == {n for n in kept if n % 10 == 0}

    try:
        trio.run(look)
    finally:
        history.close()
    with closing(apsw.Connection(str(large))) as connection:
        every = all_pages(connection, Filter(), 1000)
        assert every == [summarize(old_record(n)) for n in range(12_000, 0, -1)]
        named = all_pages(connection, Filter(name="rare"), 10)
        assert [each.id for each in named] == [7]
        both = all_pages(connection, Filter(labels={"x": "a", "number": "4321"}), 10)
        assert [each.id for each in both] == [4321]


def steps_of(path: Path, question: Callable[[apsw.Connection], object]) -> int:
    """How many instructions of SQLite's virtual machine a question takes, in hundreds."""
    seen: list[None] = []

    def count() -> bool:
        seen.append(None)
        return False

    with closing(apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)) as connection:
        connection.execute("SELECT count(*) FROM jobs WHERE id = 1")  # reads the schema
        connection.set_progress_handler(count, 100)
        question(connection)
    return len(seen)


@pytest.mark.parametrize(
    "wanted",
    [
        Filter(),
        Filter(labels={"nobody": "has it"}),
        Filter(labels={"x": "a"}),
        Filter(labels={"x": "a", "nobody": "has it"}),
        Filter(labels={"number": "77", "x": "a"}),
        Filter(name="rare"),
        Filter(name="nobody"),
        Filter(owner="bob"),
        Filter(owner="carol"),
        Filter(owner="carol", labels={"x": "a"}),
        Filter(states=frozenset({State.RUNNING})),
        Filter(states=frozenset({State.RUNNING, State.FAILED})),
        Filter(owner="bob", states=frozenset({State.RUNNING, State.FAILED, State.COMPLETED})),
        Filter(states=frozenset({State.RUNNING}), labels={"x": "a"}),
        Filter(before=120),
    ],
)
def test_page_costs_the_same_of_few_records_and_of_many(
    small: Path, large: Path, wanted: Filter
) -> None:
    few, many = (
        steps_of(path, lambda connection: find_page(wanted, 20, connection))
        for path in (small, large)
    )
    assert many <= 2 * few + 120  # the counts that choose an index, of 1000 entries at most


def test_search_for_what_nobody_has_is_bounded_and_goes_on(large: Path) -> None:
    """Each of two labels is frequent, and no job has both."""
    wanted = Filter(labels={"x": "a", "y": "b"})
    with closing(apsw.Connection(str(large))) as connection:
        page = find_page(wanted, 10, connection)
        assert page.records == []
        assert page.next is not None
        assert 0 < page.next < 12_000
        assert all_pages(connection, wanted, 10) == []
    steps = steps_of(large, lambda connection: find_page(wanted, 10, connection))
    assert steps < history_search.MAX_STEPS  # a hundred instructions for a candidate


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[History]:
    history = History.open(tmp_path / "history.db")
    yield history
    history.close()


async def test_removed_job_is_found_by_nothing(opened: History, tmp_path: Path) -> None:
    spec = JobSpec(command=("true",), name="n", labels={"a": "b"}, environment={"A": "1"})
    await opened.put(record(1, spec=spec))
    assert (await opened.page(Filter(labels={"a": "b"}, name="n"), 10)).records
    await opened.remove(record(1).id)
    assert not (await opened.page(Filter(labels={"a": "b"}), 10)).records
    with closing(apsw.Connection(str(tmp_path / "history.db"))) as connection:
        for table in ("jobs", "labels", "specs"):
            assert connection.execute(f"SELECT count(*) FROM {table}").get == 0


@pytest.mark.parametrize("padding", [0, 240], ids=["in the summary", "in the request alone"])
async def test_labels_of_a_removed_job_go_whatever_they_contain(
    opened: History, tmp_path: Path, padding: int
) -> None:
    """The history removes them by what SQLite reads of the JSON."""
    odd = ['"', "\\", "'", "é", "\U0001f600", "a/b", "\\u0041", "$.x", "[0]", "#-1", "1", "x y"]
    labels = {f"a.b/{n}": f"{part}{'v' * padding}" for n, part in enumerate(odd)}
    spec = JobSpec(command=("true",), name="n", labels=labels)
    await opened.put(record(1, spec=spec))
    await opened.put(record(2, spec=spec))
    await opened.remove(record(1).id)
    with closing(apsw.Connection(str(tmp_path / "history.db"))) as connection:
        left = connection.execute("SELECT job, count(*) FROM labels GROUP BY job").fetchall()
    assert left == [(2, len(labels) + 1)]


async def test_request_of_a_removed_job_is_not_decoded(opened: History, tmp_path: Path) -> None:
    """The thread that writes would decode it, while all other writes wait: this one could not."""
    many = {f"V{number}": "x" * 90 for number in range(100)}
    spec = JobSpec(command=("true",), labels={"a": "b"}, environment=many)
    await opened.put(record(1, spec=spec))
    with closing(apsw.Connection(str(tmp_path / "history.db"))) as connection:
        connection.execute("UPDATE specs SET spec = json_set(spec, '$.environment', 'x')")
    await opened.remove(record(1).id)
    with closing(apsw.Connection(str(tmp_path / "history.db"))) as connection:
        for table in ("jobs", "labels", "specs"):
            assert connection.execute(f"SELECT count(*) FROM {table}").get == 0


async def test_large_request_is_written_once(opened: History, tmp_path: Path) -> None:
    """A megabyte of variables was written anew for each change of the record."""
    spec = JobSpec(command=("true",), environment={f"V{n}": "x" * 1000 for n in range(1000)})
    await opened.put(record(1, State.RUNNING, spec=spec))
    log = tmp_path / "history.db-wal"
    before = log.stat().st_size
    for code in range(5):
        await opened.put(record(1, spec=spec, exit_code=code))
    assert log.stat().st_size - before < 200_000
    found = await opened.get(record(1).id)
    assert found is not None
    assert (found.spec, found.exit_code) == (spec, 4)
