"""Pages of the history: the newest records that fit, found by index in a bounded number of steps.

A search takes its candidates from one index, newest first, and checks the other conditions for
each. It takes the index of the condition that the fewest records meet (`_rarest`). Still, no choice
of an index bounds the number of candidates before the next record that fits all conditions: the
odd records may have one label and the even ones the other. So a search examines MAX_STEPS
candidates at most. Its page may therefore have fewer records than the caller wants, or none, and
says where the next search has to go on.

A page has records as the JSON text that the table holds. The wire protocol uses the same text, so
a page of a thousand records makes no objects.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence

import apsw
from attrs import field, frozen

from jobworker.model.job import JobRecord
from jobworker.model.lifecycle import State
from jobworker.serialization.json_text import dumps

MAX_STEPS = 2000
"""The most candidates that one search examines, which takes some milliseconds."""
MAX_PAGE_BYTES = 1 << 18
"""A page ends early after so many characters of JSON: sending it takes the event loop a
millisecond."""
NAME = ""
"""The label that holds a job's name in the table of labels. No real label can have this name."""
_SAMPLE = 1000
"""The most entries that are counted of each index in order to choose one."""


@frozen(kw_only=True)
class Filter:
    """The conditions of a search. A record has to meet all of them."""

    states: Collection[State] = frozenset(State)
    owner: str | None = None
    name: str = ""
    labels: Mapping[str, str] = field(factory=dict)
    before: int | None = None
    """Only records with an id below this one fit; None: all ids do."""

    def fits(self, record: JobRecord) -> bool:
        """Whether a record meets all conditions."""
        return (
            record.state in self.states
            and self.owner in (None, record.owner)
            and self.name in ("", record.spec.name)
            and self.labels.items() <= record.spec.labels.items()
            and (self.before is None or record.id < self.before)
        )


@frozen
class Page:
    """One part of the records that fit, newest first."""

    records: Sequence[tuple[int, str]]
    """The id and the JSON of each record."""
    next: int | None
    """The value of `Filter.before` for the next page; None if there are no further records."""


def find_page(wanted: Filter, limit: int, connection: apsw.Connection) -> Page:
    """Return a page of at most `limit` records that fit `wanted`. Raises apsw.Error.

    The page may have fewer records, or none, though more follow: see `Page.next`.
    """
    with connection:  # one transaction: all queries see the same state of the history
        source = _rarest(connection, _candidates(wanted))
        ids = [int(str(row[0])) for row in source.matches(connection, limit)]
        if len(ids) == limit:
            after: int | None = ids[-1]
        else:
            after = source.last_step(connection)
        found, size = list[tuple[int, str]](), 0
        # One statement for all, in the order of `ids`: a statement for each would cost more time in
        # Python than in SQLite.
        query = (
            "SELECT jobs.id, record FROM json_each(?) AS wanted "
            "CROSS JOIN jobs ON jobs.id = wanted.value"
        )
        for number, text in connection.execute(query, (dumps(ids),)):
            found.append((int(str(number)), str(text)))
            size += len(found[-1][1])
            if size > MAX_PAGE_BYTES:
                after = found[-1][0]
                break
    return Page(found, after)


@frozen
class _Source:
    """A query that walks along one index and returns candidates, the newest first."""

    query: str
    """Selects the column `id`."""
    values: tuple[str | int, ...]
    """The parameters of `query`."""
    conditions: tuple[tuple[str, tuple[str | int, ...]], ...]
    """The conditions that the index does not cover: expressions over `c.id`, with parameters."""

    def count(self, connection: apsw.Connection) -> int:
        """The number of candidates, or `_SAMPLE` if there are more."""
        query = f"SELECT count(*) FROM ({self.query} LIMIT {_SAMPLE})"  # noqa: S608
        return int(str(connection.execute(query, self.values).get))

    def matches(self, connection: apsw.Connection, limit: int) -> Iterator[tuple[object, ...]]:
        """Yield the ids of the records that fit among the first `MAX_STEPS` candidates."""
        where = " AND ".join(condition for condition, _ in self.conditions) or "1"
        values = tuple(value for _, values in self.conditions for value in values)
        query = (
            f"SELECT c.id FROM ({self.query} LIMIT {MAX_STEPS}) AS c "  # noqa: S608
            f"WHERE {where} ORDER BY c.id DESC LIMIT ?"
        )
        return connection.execute(query, (*self.values, *values, limit))

    def last_step(self, connection: apsw.Connection) -> int | None:
        """The id of candidate `MAX_STEPS`, the last that is examined; None if there are fewer."""
        query = f"{self.query} LIMIT 1 OFFSET {MAX_STEPS - 1}"
        found = connection.execute(query, self.values).get
        return None if found is None else int(str(found))


_Condition = tuple[str, tuple[str | int, ...]]


def _candidates(wanted: Filter) -> list[_Source]:
    """One source for each index that the search could use."""
    before = 1 << 62 if wanted.before is None else wanted.before
    words = [*wanted.labels.items(), *([(NAME, wanted.name)] if wanted.name else [])]
    labels: list[_Condition] = [
        (
            "EXISTS (SELECT 1 FROM labels WHERE name = ? AND value = ? AND job = c.id)",
            (name, value),
        )
        for name, value in words
    ]
    rest = _of_states_and_owner(wanted)
    sources = [
        _Source(
            "SELECT job AS id FROM labels WHERE name = ? AND value = ? AND job < ? "
            "ORDER BY job DESC",
            (name, value, before),
            (*labels[:number], *labels[number + 1 :], *rest),
        )
        for number, (name, value) in enumerate(words)
    ]
    return [*sources, _by_states_and_owner(wanted, before, labels)]


def _of_states_and_owner(wanted: Filter) -> list[_Condition]:
    conditions: list[_Condition] = []
    if set(wanted.states) != set(State):
        marks = ", ".join("?" * len(wanted.states))
        conditions.append((f"state IN ({marks})", tuple(each.value for each in wanted.states)))
    if wanted.owner is not None:
        conditions.append(("owner = ?", (wanted.owner,)))
    if not conditions:
        return []
    where = " AND ".join(condition for condition, _ in conditions)
    values = tuple(value for _, values in conditions for value in values)
    return [(f"EXISTS (SELECT 1 FROM jobs WHERE id = c.id AND {where})", values)]  # noqa: S608


def _by_states_and_owner(wanted: Filter, before: int, labels: Sequence[_Condition]) -> _Source:
    """The source for the states and the owner: the entries of each state, merged by id."""
    if wanted.owner is None and set(wanted.states) == set(State):
        query = "SELECT id FROM jobs WHERE id < ? ORDER BY id DESC"
        return _Source(query, (before,), tuple(labels))
    owner = "" if wanted.owner is None else "owner = ? AND "
    each = f"SELECT id FROM jobs WHERE {owner}state = ? AND id < ?"  # noqa: S608
    union = " UNION ALL ".join([each] * len(wanted.states)) or "SELECT id FROM jobs WHERE 0"
    values = tuple(
        value
        for state in wanted.states
        for value in (
            *(() if wanted.owner is None else (wanted.owner,)),
            state.value,
            before,
        )
    )
    return _Source(f"{union} ORDER BY id DESC", values, tuple(labels))


def _rarest(connection: apsw.Connection, sources: Sequence[_Source]) -> _Source:
    if len(sources) == 1:
        return sources[0]
    return min(sources, key=lambda source: source.count(connection))
