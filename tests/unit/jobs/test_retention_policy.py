"""The policy of retention: what is chosen to go."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker.jobs.retention_policy import EndedOutput, RetentionPolicy, keeps
from jobworker.model.job import JobId

SECOND = 1_000_000_000
KEPT = [EndedOutput(JobId(n), n * SECOND, 100) for n in range(1, 6)]


def chosen(
    kept: Sequence[EndedOutput], policy: RetentionPolicy, *, now_s: int, live_bytes: int = 0
) -> list[EndedOutput]:
    """What does not stay by `policy` of `kept`, the oldest first."""
    rest, size = list(kept), live_bytes + sum(each.size for each in kept)
    while rest and not keeps(policy, rest[0], number=len(rest), size=size, now_ns=now_s * SECOND):
        size -= rest.pop(0).size
    return list(kept[: len(kept) - len(rest)])


@pytest.mark.parametrize(
    ("policy", "live_bytes", "gone"),
    [
        (RetentionPolicy(), 0, []),
        (RetentionPolicy(max_age_seconds=7), 0, [1, 2]),
        (RetentionPolicy(max_jobs=3), 0, [1, 2]),
        (RetentionPolicy(max_jobs=0), 0, [1, 2, 3, 4, 5]),
        (RetentionPolicy(max_bytes=300), 0, [1, 2]),
        (RetentionPolicy(max_bytes=300), 150, [1, 2, 3, 4]),
        (RetentionPolicy(max_bytes=300), 1000, [1, 2, 3, 4, 5]),
        (RetentionPolicy(max_age_seconds=9, max_jobs=4, max_bytes=500), 0, [1]),
    ],
)
def test_oldest_goes_first_until_all_bounds_hold(
    policy: RetentionPolicy, live_bytes: int, gone: list[int]
) -> None:
    assert [each.job for each in chosen(KEPT, policy, now_s=10, live_bytes=live_bytes)] == gone


optional = st.none() | st.integers(0, 40)


@given(
    kept=st.lists(
        st.tuples(st.integers(0, 30), st.integers(0, 20)).map(lambda pair: pair), max_size=8
    ),
    age=optional,
    jobs=optional,
    size=optional,
)
def test_what_is_left_keeps_the_policy_and_no_more_goes(
    kept: list[tuple[int, int]], age: int | None, jobs: int | None, size: int | None
) -> None:
    among = [
        EndedOutput(JobId(n), end * SECOND, size) for n, (end, size) in enumerate(sorted(kept), 1)
    ]
    policy = RetentionPolicy(max_age_seconds=age, max_jobs=jobs, max_bytes=size)

    def holds(rest: list[EndedOutput]) -> bool:
        return (
            (age is None or all(30 - k.ended_ns // SECOND <= age for k in rest))
            and (jobs is None or len(rest) <= jobs)
            and (size is None or sum(k.size for k in rest) <= size)
        )

    gone = chosen(among, policy, now_s=30)
    rest = [k for k in among if k not in gone]
    assert not rest or not gone or max(k.ended_ns for k in gone) <= min(k.ended_ns for k in rest)
    assert holds(rest) or not rest
    if gone:
        assert not holds([*rest, gone[-1]])
