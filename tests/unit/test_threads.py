"""Work in a thread that could not be had at once."""

import pytest

from jobworker.threads import REFUSED, in_thread


async def test_work_that_has_begun_is_not_begun_again() -> None:
    calls = []

    def fails_like_a_refused_thread() -> None:
        calls.append(1)
        raise RuntimeError(REFUSED)

    with pytest.raises(RuntimeError, match="start new thread"):
        await in_thread(fails_like_a_refused_thread)
    assert calls == [1]


async def test_arguments_and_result_pass() -> None:
    assert await in_thread(divmod, 7, 2) == (3, 1)
