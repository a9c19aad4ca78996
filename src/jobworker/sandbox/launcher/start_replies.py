"""Answers the requests for starts: the program runs, or the start has failed.

A start is answered when its program runs, or when nothing of the failed start is left.

What must hold: each start is answered at most once, and not at all if its service has gone.

Standard library only.
"""

from collections.abc import Callable, Sequence
from functools import partial

from jobworker.sandbox import channel
from jobworker.sandbox.launcher.child import NOBODY, Child
from jobworker.sandbox.launcher.reports import DIED, Tell
from jobworker.sandbox.protocol.operations import SPAWN, answer
from jobworker.sandbox.protocol.replies import Spawned


class StartReplies:
    """The replies to starts that have a child."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell

    def succeed(self, child: Child) -> None:
        """Report that a child's program runs, with the job's pipes."""
        assert child.request is not None
        request, child.request = child.request, None
        word = answer(SPAWN, Spawned(child.pid))
        self._answer(request, word, (child.stdout, child.stderr))

    def fail_when_cleared(self, child: Child) -> None:
        """Report that a child's start has failed as soon as nothing of it is left."""
        child.when_cleared = partial(self.fail, child, child.when_cleared)

    def fail(self, child: Child, removed: Callable[[], None] | None) -> None:
        """Report that a child's start has failed. `removed` answers the request to remove the job.

        Such a request may come while the job starts.
        """
        if child.request is not None:  # else it was reported already, or its service has gone
            self._answer(child.request, {"error": child.failure or DIED})
            child.request = None
        if removed is not None:
            removed()

    def _answer(self, request: int, word: channel.Message, descriptors: Sequence[int] = ()) -> None:
        """Answer the request for a start, if its service is still connected."""
        if request != NOBODY:
            self._tell({"id": request, **word}, descriptors)
