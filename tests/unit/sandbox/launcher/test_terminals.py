"""Each job's part of the host's pseudo-terminals."""

import pytest

from jobworker.sandbox.launcher.terminals import FEWEST, MOST, share


@pytest.mark.parametrize(
    ("maximum", "reserve", "jobs", "each"),
    [
        (4096, 1024, 102, 30),
        (4096, 1024, 4, MOST),
        (4096, 1024, 2000, FEWEST),
        (0, 1024, 10, FEWEST),
        (1_048_576, 1024, 102, MOST),
    ],
)
def test_all_jobs_together_have_what_the_host_has_for_them(
    maximum: int, reserve: int, jobs: int, each: int
) -> None:
    assert share(maximum, reserve, jobs) == each
