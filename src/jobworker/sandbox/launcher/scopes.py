"""Scopes on their way out: the fork server kills and removes them, again while they are busy.

The kernel counts a process in its group until it is through with it, a moment after its parent was
told. So a removal is refused then, and all that were refused are tried again together.

Standard library only.
"""

import errno
from collections.abc import Callable
from functools import partial

from jobworker.sandbox.channel import Message
from jobworker.sandbox.event_loop import Turns
from jobworker.sandbox.forks import ForkServer
from jobworker.sandbox.log import say

AGAIN_SECONDS = 0.005
SELDOM_SECONDS = 0.08
"""The pause doubles up to this, while none of those that are tried again lets go."""


class Scopes:
    """Kills and removes scopes by their names."""

    def __init__(self, turns: Turns, forks: ForkServer) -> None:
        self._turns, self._forks = turns, forks
        self._killing: dict[str, bool] = {}
        """Those that are being killed, and whether they are to be once more."""
        self._removing: dict[str, Callable[[], None]] = {}
        """What to call when they are gone."""
        self._busy: set[str] = set()
        """Those of them that are tried again."""
        self._pause = AGAIN_SECONDS

    @property
    def is_idle(self) -> bool:
        """Whether nothing is to be removed."""
        return not self._removing

    def kill(self, name: str) -> None:
        """SIGKILL everything in a scope, soon."""
        if name in self._killing:
            self._killing[name] = True
            return
        self._forks.call("kill", (name,), partial(self._on_killed, name))
        self._killing[name] = False

    def _on_killed(self, name: str, answer: Message, _: list[int]) -> None:
        again = self._killing.pop(name)
        if answer.get("errno", errno.ENOENT) != errno.ENOENT:
            say(f"cannot kill all of {name}: {answer}")
        if again:
            self.kill(name)

    def remove(self, name: str, done: Callable[[], None]) -> None:
        """Remove a scope, whose processes have ended or were killed, and call `done` then."""
        self._removing[name] = done
        self._ask(name)

    def _ask(self, name: str) -> None:
        try:
            self._forks.call("remove", (name,), partial(self._on_answer, name))
        except OSError:  # no memory to be had
            self._try_later(name)

    def _on_answer(self, name: str, answer: Message, _: list[int]) -> None:
        if "errno" in answer:
            self._try_later(name)
            return
        self._busy.discard(name)
        self._pause = AGAIN_SECONDS
        self._turns.see_through(self._removing.pop(name))

    def _try_later(self, name: str) -> None:
        if name not in self._busy:
            self._busy.add(name)
            self._pause = AGAIN_SECONDS
        if not self._turns.is_set(self._try_again):
            self._turns.call_in(self._pause, self._try_again)

    def _try_again(self) -> None:
        self._pause = min(2 * self._pause, SELDOM_SECONDS)
        for name in list(self._busy):
            self._ask(name)
