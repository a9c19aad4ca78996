"""Pages of the history: the newest records that fit, found by index in a bounded number of steps.

A page takes its candidates from one index, newest first, and looks the other conditions up for
each. The index is that of the condition which the fewest records meet (`_candidates`). No choice of
an index bounds the way to the next record that fits all conditions, though: every second record may
have one label and every other second record another. So a page looks at MAX_STEPS candidates at
most, and then says where to go on, though it found fewer records than were asked for, or none.

Records are answered as the JSON text that is stored, which is also the one of the wire: a page of a
thousand makes no objects.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence

import apsw
from attrs import field, frozen

from jobworker.model.job import JobRecord
from jobworker.model.lifecycle import State
from jobworker.serialization.json_text import dumps

MAX_STEPS = 2000
"""Candidates that one page looks at: some milliseconds."""
MAX_PAGE_BYTES = 1 << 18
"""Where a page of records ends early: sending one takes the event loop a millisecond."""
NAME = ""
"""Stands in the table of labels for a job's name, which no label can be called."""
_SAMPLE = 1000
"""So many entries of an index are counted to choose one."""


@frozen(kw_only=True)
class Filter:
    """Which records are wanted: those that fit all of this."""

    states: Collection[State] = frozenset(State)
    owner: str | None = None
    name: str = ""
    labels: Mapping[str, str] = field(factory=dict)
    before: int | None = None
    """Ids below this one."""

    def fits(self, record: JobRecord) -> bool:
        """Whether a record is wanted."""
        return (
            record.state in self.states
            and self.owner in (None, record.owner)
            and self.name in ("", record.spec.name)
            and self.labels.items() <= record.spec.labels.items()
            and (self.before is None or record.id < self.before)
        )


@frozen
class Page:
    """Some of the records that are wanted, newest first: their ids, and their JSON."""

    records: Sequence[tuple[int, str]]
    next: int | None
    """The rest has ids below this one; None where there is no rest."""


def find_page(wanted: Filter, limit: int, connection: apsw.Connection) -> Page:
    """At most `limit` stored records that fit; fewer, and perhaps none, where `next` goes on."""
    with connection:  # one state of the history for all queries
        source = _rarest(connection, _candidates(wanted))
        ids = [int(str(row[0])) for row in source.matches(connection, limit)]
        if len(ids) == limit:
            after: int | None = ids[-1]
        else:
            after = source.last_step(connection)
        found, size = list[tuple[int, str]](), 0
        # One statement for all, in the order of `ids`: in Python each costs more than in SQLite.
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
    """An index that answers ids, the newest first."""

    query: str
    """Selects `id`."""
    values: tuple[str | int, ...]
    conditions: tuple[tuple[str, tuple[str | int, ...]], ...]
    """What else holds for each record that is wanted, of `c.id`, with its values."""

    def count(self, connection: apsw.Connection) -> int:
        """How many entries it has, as far as that is worth knowing."""
        query = f"SELECT count(*) FROM ({self.query} LIMIT {_SAMPLE})"  # noqa: S608
        return int(str(connection.execute(query, self.values).get))

    def matches(self, connection: apsw.Connection, limit: int) -> Iterator[tuple[object, ...]]:
        """Of the first candidates the ids of those that fit."""
        where = " AND ".join(condition for condition, _ in self.conditions) or "1"
        values = tuple(value for _, values in self.conditions for value in values)
        query = (
            f"SELECT c.id FROM ({self.query} LIMIT {MAX_STEPS}) AS c "  # noqa: S608
            f"WHERE {where} ORDER BY c.id DESC LIMIT ?"
        )
        return connection.execute(query, (*self.values, *values, limit))

    def last_step(self, connection: apsw.Connection) -> int | None:
        """The id of the last candidate that was looked at; None where there are no more."""
        query = f"{self.query} LIMIT 1 OFFSET {MAX_STEPS - 1}"
        found = connection.execute(query, self.values).get
        return None if found is None else int(str(found))


_Condition = tuple[str, tuple[str | int, ...]]


def _candidates(wanted: Filter) -> list[_Source]:
    """Each index that a search may go along, with what remains to be looked up."""
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
    """Candidates in the states and of the owner: the entries of each state, merged by id."""
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
