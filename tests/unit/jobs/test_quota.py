"""Quotas: each measure is held to its sum, and the error says which one and how far."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker.errors import QuotaExceeded
from jobworker.jobs.quota import QuotaUse, check_quota
from jobworker.model.access import NO_QUOTA, Quota
from jobworker.model.job import Limits

from ..strategies import examples

MB = 1 << 20
LIVE = Limits(cpu_percent=50, memory_bytes=64 * MB, output_bytes=MB)


def refusal(quota: Quota, use: QuotaUse, wanted: Limits) -> dict[str, object]:
    with pytest.raises(QuotaExceeded) as caught:
        check_quota(quota, use, wanted)
    assert caught.value.remedy
    return caught.value.data


@pytest.mark.parametrize(
    ("quota", "kept", "told"),
    [
        (Quota(jobs=2), 0, {"quota": "jobs", "limit": 2, "used": 2, "asked": 1}),
        (Quota(cpu_percent=149), 0, {"quota": "cpu", "limit": 149, "used": 100, "asked": 50}),
        (
            Quota(memory_bytes=192 * MB - 1),
            0,
            {"quota": "memory", "limit": 192 * MB - 1, "used": 128 * MB, "asked": 64 * MB},
        ),
        (
            Quota(output_bytes=3 * MB),
            1,
            {"quota": "output", "limit": 3 * MB, "used": 2 * MB + 1, "asked": MB},
        ),
    ],
)
def test_quota_is_told_with_its_use(quota: Quota, kept: int, told: dict[str, object]) -> None:
    assert refusal(quota, QuotaUse((LIVE, LIVE), kept), LIVE) == told


def test_sizes_are_told_in_the_unit_in_which_they_are_asked_for() -> None:
    with pytest.raises(QuotaExceeded) as caught:
        check_quota(Quota(output_bytes=3 * MB), QuotaUse((LIVE, LIVE), 1), LIVE)
    assert caught.value.message == (
        "cannot run the command: it asks for 1 MiB of output, you have 2.1 MiB already, and your "
        "quota is 3 MiB"
    )


@pytest.mark.parametrize(
    ("use", "asked", "remedy"),
    [
        (QuotaUse(()), 2000, "ask for less (of worker-cli: --max-output)"),
        (QuotaUse((LIVE,), 5), 2000, "ask for less (of worker-cli: --max-output)"),
        (
            QuotaUse((LIVE,)),
            1024,
            "wait for a job to end, or ask for less (of worker-cli: --max-output)",
        ),
        (QuotaUse((), 5), 1024, "remove old output, or ask for less (of worker-cli: --max-output)"),
        (
            QuotaUse((LIVE,), 5),
            1024,
            "wait for a job to end, remove old output, or ask for less "
            "(of worker-cli: --max-output)",
        ),
    ],
)
def test_remedy_is_one_that_helps(use: QuotaUse, asked: int, remedy: str) -> None:
    with pytest.raises(QuotaExceeded) as caught:
        check_quota(Quota(output_bytes=1024 * MB), use, Limits(output_bytes=asked * MB))
    assert caught.value.remedy == remedy


def test_what_just_fits_is_let_in() -> None:
    full = Quota(jobs=3, cpu_percent=150, memory_bytes=192 * MB, output_bytes=3 * MB + 7)
    check_quota(full, QuotaUse((LIVE, LIVE), 7), LIVE)


@pytest.mark.parametrize("name", ["cpu_percent", "memory_bytes", "output_bytes"])
def test_job_without_a_limit_does_not_fit_under_a_quota(name: str) -> None:
    limits = {"cpu_percent": 1, "memory_bytes": MB * 4, "output_bytes": 1, name: 0}
    quota = Quota(**{name: 1 << 40})
    data = refusal(quota, QuotaUse(()), Limits(**limits))
    assert data["asked"] is None
    check_quota(NO_QUOTA, QuotaUse(()), Limits(**limits))


@examples()
@given(st.lists(st.integers(1, 100), max_size=20), st.integers(1, 200))
def test_no_order_of_requests_goes_over(asked: list[int], quota: int) -> None:
    live: tuple[Limits, ...] = ()
    for percent in asked:
        wanted = Limits(cpu_percent=percent)
        try:
            check_quota(Quota(cpu_percent=quota), QuotaUse(live), wanted)
        except QuotaExceeded:
            continue
        live = (*live, wanted)
    assert sum(each.cpu_percent or 0 for each in live) <= quota
