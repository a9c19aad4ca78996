"""A Trio run that moves only while a step of a synchronous test runs.

Hypothesis calls the rules of a state machine from outside of Trio. The run has a thread of its own,
which is blocked between two steps, event loop included: no task moves then, and no clock. So what
an example does depends on its steps alone.
"""

import queue
import threading
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio
import trio.testing
from attrs import define, field

T = TypeVar("T")

REAL_SECONDS = 60.0
"""A step that takes longer has hung: no step sleeps by the real clock."""


@define(eq=False)
class SteppedTrio:
    """One run; `close` ends it."""

    nursery: trio.Nursery = field(init=False)
    """Has the tasks that outlive a step."""
    _steps: queue.SimpleQueue[Callable[[], Awaitable[object]] | None] = field(
        factory=queue.SimpleQueue, init=False
    )
    _results: queue.SimpleQueue[tuple[object, BaseException | None]] = field(
        factory=queue.SimpleQueue, init=False
    )
    _thread: threading.Thread = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._thread = threading.Thread(target=self._run, name="stepped-trio", daemon=True)
        self._thread.start()

    def do(self, step: Callable[[], Awaitable[T]]) -> T:
        """Run one step: what it returns. Raises what it, or a task of the nursery, has raised."""
        self._steps.put(step)
        value, fault = self._results.get(timeout=REAL_SECONDS)
        if fault is not None:
            raise fault
        return value  # type: ignore[return-value]

    def close(self) -> None:
        """Cancel what is left, and end the run."""
        self._steps.put(None)
        self._thread.join(REAL_SECONDS)
        assert not self._thread.is_alive(), "a task of the run cannot be cancelled"

    # --- in the thread ----------------------------------------------------------------------

    def _run(self) -> None:
        try:
            trio.run(self._serve, clock=trio.testing.MockClock(autojump_threshold=0))
        except BaseException as error:  # noqa: BLE001 - it is the next step's
            self._results.put((None, error))

    async def _serve(self) -> None:
        async with trio.open_nursery() as self.nursery:
            while (step := self._steps.get()) is not None:  # blocks the whole run, on purpose
                try:
                    self._results.put((await step(), None))
                except Exception as error:  # noqa: BLE001 - it is the step's
                    self._results.put((None, error))
            self.nursery.cancel_scope.cancel()
