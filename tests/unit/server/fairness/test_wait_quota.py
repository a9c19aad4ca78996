"""How many requests of one name may wait at a time."""

import pytest

from jobworker.errors import TooManyFollows, TooManyRequests
from jobworker.server.fairness.wait_quota import WaitQuota


def test_each_name_has_so_many_at_a_time() -> None:
    waits = WaitQuota(2)
    waits.acquire("ann", TooManyFollows)
    with waits.waiting("ann"):
        with pytest.raises(TooManyFollows, match="ann does so 2 times already"):
            waits.acquire("ann", TooManyFollows)
        with pytest.raises(TooManyRequests), waits.waiting("ann"):
            pytest.fail("it is beyond the bound")
        waits.acquire("bob", TooManyFollows)
    with waits.waiting("ann"):
        pass
    waits.release("ann")
    waits.release("bob")
    assert not waits._counts
