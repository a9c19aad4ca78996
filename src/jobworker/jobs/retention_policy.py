"""The policy of retention: which ended jobs' output is to be removed. Pure.

The output of the oldest ends is removed first, until age, number and size are within their bounds.
"""

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


def keeps(
    policy: RetentionPolicy, oldest: EndedOutput, *, number: int, size: int, now_ns: int
) -> bool:
    """Whether a policy keeps all output, of which `oldest` has ended first.

    `number`, `size`: how much output there is: its jobs and its bytes.
    """
    age_ns = now_ns - oldest.ended_ns
    too_old = policy.max_age_seconds is not None and age_ns > policy.max_age_seconds * 1e9
    too_many = policy.max_jobs is not None and number > policy.max_jobs
    too_large = policy.max_bytes is not None and size > policy.max_bytes
    return not (too_old or too_many or too_large)
