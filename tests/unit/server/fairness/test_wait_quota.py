"""How many requests of one name may wait at a time."""

import pytest

from jobworker.errors import TooManyFollows, TooManyRequests
from jobworker.server.fairness.wait_quota import WaitQuota


def test_each_name_has_so_many_at_a_time() -> None:
    waits = WaitQuota(2)
    waits.take("ann", TooManyFollows)
    with waits.one_more("ann"):
        with pytest.raises(TooManyFollows, match="ann does so 2 times already"):
            waits.take("ann", TooManyFollows)
        with pytest.raises(TooManyRequests), waits.one_more("ann"):
            pytest.fail("it is beyond the bound")
        waits.take("bob", TooManyFollows)
    with waits.one_more("ann"):
        pass
    waits.give_back("ann")
    waits.give_back("bob")
    assert not waits._counts
