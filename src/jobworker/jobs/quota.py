"""Quotas: what the live jobs of one name may have together. Pure.

A live job counts with its limits, not with its use, so every job can use all that it was promised.
Waiting jobs count like running ones: otherwise one tenant could fill the queue. For output, the
limits of live jobs count, and the bytes that ended jobs of the name have on the disk.

If a quota bounds something, a job has to ask for a limit on it. A job without a limit is refused,
since it cannot be added up.
"""

from collections.abc import Iterable

from attrs import frozen

from jobworker.errors import QuotaExceeded
from jobworker.model.access import Quota
from jobworker.model.job import Limits
from jobworker.model.units import format_mebibytes

_MEASURES = (
    ("cpu_percent", "cpu", str, "percent of CPU", "(of worker-cli: --max-cpu)"),
    ("memory_bytes", "memory", format_mebibytes, "of memory", "(of worker-cli: --max-memory)"),
    ("output_bytes", "output", format_mebibytes, "of output", "(of worker-cli: --max-output)"),
)


@frozen
class QuotaUse:
    """What the jobs of a name have already."""

    live: tuple[Limits, ...]
    """The limits of each live job."""
    kept_output_bytes: int = 0
    """The bytes of output of ended jobs."""


def check_quota(quota: Quota, use: QuotaUse, wanted: Limits) -> None:
    """Raise QuotaExceeded unless one more job with the limits `wanted` fits.

    The error's `data` has the name of the `quota`, its `limit`, and how much is `used` and `asked`
    for (None if the job asks for no limit).
    """
    if quota.jobs and len(use.live) >= quota.jobs:
        raise QuotaExceeded(
            f"cannot run the command: you have {len(use.live)} live jobs, and your quota is "
            f"{quota.jobs}",
            remedy="wait for one to end, or stop it",
            data={"quota": "jobs", "limit": quota.jobs, "used": len(use.live), "asked": 1},
        )
    for key, name, words, unit, option in _MEASURES:
        limit, asked = getattr(quota, key), getattr(wanted, key)
        if not limit:
            continue
        used = sum(_sizes(getattr(each, key) for each in use.live))
        used += use.kept_output_bytes if name == "output" else 0
        data = {"quota": name, "limit": limit, "used": used, "asked": asked or None}
        if not asked:
            raise QuotaExceeded(
                f"cannot run the command: it asks for no limit, and your quota is {words(limit)} "
                f"{unit}",
                remedy=f"give it a limit {option}",
                data=data,
            )
        if used + asked > limit:
            raise QuotaExceeded(
                f"cannot run the command: it asks for {words(asked)} {unit}, you have "
                f"{words(used)} already, and your quota is {words(limit)}",
                remedy=_remedy(use, asked > limit, name == "output", option),
                data=data,
            )


def _remedy(use: QuotaUse, never: bool, is_output: bool, option: str) -> str:
    """How to make room for a job. `never`: it would not fit even if the quota were unused."""
    less = f"ask for less {option}"
    if never:
        return less
    ways = ["wait for a job to end"] * bool(use.live)
    ways += ["remove old output"] * bool(is_output and use.kept_output_bytes)
    return ", ".join([*ways, f"or {less}"])


def _sizes(values: Iterable[int | None]) -> Iterable[int]:
    return (value or 0 for value in values)
