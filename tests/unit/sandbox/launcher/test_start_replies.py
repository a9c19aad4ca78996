"""How often, and to whom, a start is answered."""

from collections.abc import Sequence

import pytest

from jobworker.sandbox.channel import Message
from jobworker.sandbox.launcher.child import NOBODY, Child
from jobworker.sandbox.launcher.reports import DIED, GIVEN_UP
from jobworker.sandbox.launcher.start_replies import StartReplies

from .conftest import new_child


class Told:
    """The replies to a start, with their descriptors."""

    def __init__(self) -> None:
        self.words = list[object]()
        self.replies = StartReplies(self._tell)

    def _tell(self, message: Message, descriptors: Sequence[int]) -> None:
        self.words.append((message, tuple(descriptors)))


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def child() -> Child:
    child = new_child(0)
    child.pid, child.stdout, child.stderr = 100, 5, 6
    child.request = 7
    return child


def test_start_that_has_succeeded_is_answered_once_with_its_pipes(told: Told, child: Child) -> None:
    told.replies.succeed(child)
    told.replies.fail(child, None)
    assert told.words == [({"id": 7, "ok": {"pid": 100}}, (5, 6))]


@pytest.mark.parametrize(("failure", "error"), [(None, DIED), (GIVEN_UP, GIVEN_UP)])
def test_start_that_has_failed_is_answered_once_with_its_reason(
    told: Told, child: Child, failure: Message | None, error: Message
) -> None:
    child.failure = failure
    for _ in range(2):
        told.replies.fail(child, None)
    assert told.words == [({"id": 7, "error": error}, ())]


def test_failure_is_told_when_nothing_is_left_and_before_the_reply_to_a_removal(
    told: Told, child: Child
) -> None:
    child.when_cleared = lambda: told.words.append("removed")
    told.replies.fail_when_cleared(child)
    assert not told.words
    child.when_cleared()
    assert told.words == [({"id": 7, "error": DIED}, ()), "removed"]


def test_start_whose_service_has_gone_is_answered_to_no_one(told: Told, child: Child) -> None:
    child.request = NOBODY
    told.replies.fail(child, None)
    assert child.request is None
    child.request = NOBODY
    told.replies.succeed(child)
    assert child.request is None
    assert not told.words
