"""The policy of retention: which ended jobs' output is to be removed. Pure.

The output of the oldest ends is removed first, until age, number and size are within their bounds.
"""

from collections.abc import Callable, Iterable

from attrs import frozen

from jobworker.model.job import JobId


@frozen
class EndedOutput:
    """The output of an ended job on the disk."""

    job: JobId
    ended_ns: int
    """When the job ended, in nanoseconds since the epoch."""
    size: int
    """The bytes of its three files."""


@frozen(kw_only=True)
class RetentionPolicy:
    """The bounds on the output that is kept. None is no bound."""

    max_age_seconds: float | None = None
    max_jobs: int | None = None
    """The most ended jobs with output."""
    max_bytes: int | None = None
    """The most bytes of all output, including that of live jobs."""


def choose(
    oldest_first: Iterable[EndedOutput],
    policy: RetentionPolicy,
    *,
    number: int,
    size: int,
    now_ns: int,
    goes: Callable[[EndedOutput], bool],
) -> None:
    """Call `goes` for the output that `policy` does not keep, the oldest end first.

    `number`, `size`: how much output there is: its jobs and its bytes. `goes` removes an output if
    it can, and returns whether it counts no longer. Output that cannot be removed still takes
    space, so by size the next one has to go in its place. By number it counts as removed.
    """
    for each in oldest_first:
        age_ns = now_ns - each.ended_ns
        too_old = policy.max_age_seconds is not None and age_ns > policy.max_age_seconds * 1e9
        too_many = policy.max_jobs is not None and number > policy.max_jobs
        too_large = policy.max_bytes is not None and size > policy.max_bytes
        if not (too_old or too_many or too_large):
            break
        number -= 1
        if goes(each):
            size -= each.size
