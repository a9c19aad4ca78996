"""Has the fork server kill and remove scopes, and repeats a removal while the scope is busy.

A process stays in its control group until the kernel has released it, a moment after its parent was
notified. Until then the kernel refuses to remove the group (EBUSY). All removals that were refused
are tried again together.

Standard library only.
"""

import errno
from collections.abc import Callable
from functools import partial

from jobworker.sandbox.channel import Message
from jobworker.sandbox.event_loop import EventLoop
from jobworker.sandbox.forks import ForkServer
from jobworker.sandbox.log import log_line

AGAIN_SECONDS = 0.005
SELDOM_SECONDS = 0.08
"""The longest pause between two tries. The pause doubles up to this while all scopes stay busy."""


class Scopes:
    """Kills and removes scopes by their names."""

    def __init__(self, event_loop: EventLoop, forks: ForkServer) -> None:
        self._event_loop, self._forks = event_loop, forks
        self._killing: dict[str, bool] = {}
        """The scopes with a kill under way, and whether to kill once more after it."""
        self._removing: dict[str, Callable[[], None]] = {}
        """The scopes that are being removed, and the function to call when each is gone."""
        self._refused: set[str] = set()
        """The scopes whose removal was refused before."""
        self._busy: list[str] = []
        """Those of them that wait for the next try. A scope that the fork server is asked to remove
        is not among them: a slow fork server would get ever more calls otherwise."""
        self._pause = AGAIN_SECONDS

    @property
    def is_idle(self) -> bool:
        """Whether no scope is being removed."""
        return not self._removing

    def kill(self, name: str) -> None:
        """Have the fork server send SIGKILL to all processes in a scope. Returns at once."""
        if name in self._killing:
            self._killing[name] = True
            return
        self._forks.call("kill", (name,), partial(self._on_killed, name))
        self._killing[name] = False

    def _on_killed(self, name: str, answer: Message, _: list[int]) -> None:
        again = self._killing.pop(name)
        if answer.get("errno", errno.ENOENT) != errno.ENOENT:
            log_line(f"cannot kill all of {name}: {answer}")
        if again:
            self.kill(name)

    def remove(self, name: str, done: Callable[[], None]) -> None:
        """Have the fork server remove a scope, and call `done` when it is gone.

        What must hold: the processes of the scope have ended or were killed.
        """
        self._removing[name] = done
        self._ask(name)

    def _ask(self, name: str) -> None:
        try:
            self._forks.call("remove", (name,), partial(self._on_answer, name))
        except OSError:  # the fork server cannot be called now
            self._try_later(name)

    def _on_answer(self, name: str, answer: Message, _: list[int]) -> None:
        if "errno" in answer:
            self._try_later(name)
            return
        self._refused.discard(name)
        self._pause = AGAIN_SECONDS
        self._event_loop.call_with_retries(self._removing.pop(name))

    def _try_later(self, name: str) -> None:
        if name not in self._refused:
            self._refused.add(name)
            self._pause = AGAIN_SECONDS
        self._busy.append(name)
        if not self._event_loop.is_scheduled(self._try_again):
            self._event_loop.call_later(self._pause, self._try_again)

    def _try_again(self) -> None:
        self._pause = min(2 * self._pause, SELDOM_SECONDS)
        names, self._busy = self._busy, []
        for name in names:
            self._ask(name)
