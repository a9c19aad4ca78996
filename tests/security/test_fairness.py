"""The short form of `make bench-fairness`: a flood harms neither a quiet client nor the service.

Times are those of a busy machine, so their bounds are generous.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from bench.fairness import MB, PEAK_BYTES, flood, percentile, place

MANY_MS = 2000.0


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with place() as made:
        yield made


LONG = [pytest.param(name, marks=pytest.mark.soak) for name in ("unread", "garbage", "connects")]


@pytest.mark.parametrize("name", ["follows", "ends", *LONG])
async def test_flood_leaves_a_quiet_client_in_peace(directory: Path, name: str) -> None:
    row = await flood(directory, name, 6 if name == "follows" else 1.5, idle_seconds=0.5)
    assert row.asked
    assert percentile(row.flooded.hello, 99) < MANY_MS
    assert percentile(row.flooded.run, 99) < 5 * MANY_MS
    assert row.peak_bytes < PEAK_BYTES
    if name == "follows":  # they held 190 MB: each what it had sent last, until its next turn
        assert row.peak_bytes < row.start_bytes + 80 * MB
        assert row.after_bytes < row.start_bytes + 40 * MB
    assert row.descriptors_left <= 0
