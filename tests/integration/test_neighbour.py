"""The short form of `make bench-neighbour`: what a hostile job does to its neighbours is bounded.

Times are those of a busy machine, so their bounds are generous; that the launcher waits for nothing
that a job shaped is held without a clock by test_launcher_waits.
"""

from collections.abc import Iterator

import pytest
from bench.neighbour import ATTACKS, Neighbourhood, neighbourhood

from jobworker.sandbox.launcher.terminals import MOST

pytestmark = pytest.mark.alone

MANY_MS = 2000.0


@pytest.fixture(scope="module")
def hood() -> Iterator[Neighbourhood]:
    with neighbourhood() as made:
        yield made


@pytest.mark.parametrize("name", ["extents", "terminals", "descriptors", "oom", "netlink"])
def test_hostile_job_harms_itself_alone(hood: Neighbourhood, name: str) -> None:
    ends = name in ("oom", "netlink")
    row = hood.attack(ATTACKS[name], 60 if ends else 0.2)
    assert row.longest_turn_ms < MANY_MS
    assert row.p99_ms < 5 * MANY_MS
    assert row.terminals <= MOST
    assert row.ended == ("out of memory" if ends else "")
