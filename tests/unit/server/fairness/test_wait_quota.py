"""How many requests of one name may wait at a time."""

import pytest

from jobworker.errors import TooManyFollows, TooManyRequests
from jobworker.server.fairness.wait_quota import Crowds


def test_each_name_has_so_many_at_a_time() -> None:
    crowds = Crowds(2)
    crowds.take("ann", TooManyFollows)
    with crowds.one_more("ann"):
        with pytest.raises(TooManyFollows, match="ann does so 2 times already"):
            crowds.take("ann", TooManyFollows)
        with pytest.raises(TooManyRequests), crowds.one_more("ann"):
            pytest.fail("it is beyond the bound")
        crowds.take("bob", TooManyFollows)
    with crowds.one_more("ann"):
        pass
    crowds.give_back("ann")
    crowds.give_back("bob")
    assert not crowds._counts
