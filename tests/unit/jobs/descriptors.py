"""A process that has few file descriptors left."""

import fcntl
import itertools
import resource
from collections.abc import Iterator
from contextlib import contextmanager


def _is_free(number: int) -> bool:
    try:
        fcntl.fcntl(number, fcntl.F_GETFD)
    except OSError:
        return True
    return False


@contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """Let this process open `count` more descriptors and none beyond, while the block lasts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The limit is on the number of a new descriptor.
    limit = next(itertools.islice(filter(_is_free, itertools.count()), count, None))
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
