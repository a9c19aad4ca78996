"""Blocking work in a worker thread, which waits while the system gives the process no thread.

A limit on the processes of a service (`TasksMax=`, RLIMIT_NPROC) counts its threads too. Where it
is reached, clone(2) fails with EAGAIN for a moment: other work's thread is soon free to be used
again. That moment must not end a job, nor be told as a fault.
"""

import logging
from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

import trio
from attrs import frozen

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")

log = logging.getLogger("jobworker")

AGAIN_SECONDS = 0.05
TOLD_EVERY_SECONDS = 60.0
REFUSED = "can't start new thread"
"""What `threading` says of EAGAIN: its RuntimeError has no errno."""


@frozen
class _Prompt:
    """A limiter that takes no turn of the event loop where it has room, as trio's own does."""

    _limiter: trio.CapacityLimiter

    async def acquire_on_behalf_of(self, borrower: object) -> None:
        try:
            self._limiter.acquire_on_behalf_of_nowait(borrower)
        except trio.WouldBlock:
            await self._limiter.acquire_on_behalf_of(borrower)

    def release_on_behalf_of(self, borrower: object) -> None:
        self._limiter.release_on_behalf_of(borrower)


async def in_thread(
    work: Callable[[*Arguments], T],
    *arguments: *Arguments,
    limiter: trio.CapacityLimiter | None = None,
    abandon_on_cancel: bool = False,
) -> T:
    """Like `trio.to_thread.run_sync`, but waits for a thread where none can be started.

    Work that has begun is not begun again, whatever it raises.
    """
    begun = False

    def begin() -> T:
        nonlocal begun
        begun = True
        return work(*arguments)

    tell_at = trio.current_time()
    while True:
        try:
            return await trio.to_thread.run_sync(
                begin,
                limiter=_Prompt(limiter or trio.to_thread.current_default_thread_limiter()),  # type: ignore[arg-type]
                abandon_on_cancel=abandon_on_cancel,
            )
        except RuntimeError as error:
            if begun or str(error) != REFUSED:
                raise
        if trio.current_time() >= tell_at:
            tell_at = trio.current_time() + TOLD_EVERY_SECONDS
            log.error(
                "the system refuses a thread: waiting for one "
                "(raise the limit of processes: TasksMax=, ulimit -u, pids.max)"
            )
        await trio.sleep(AGAIN_SECONDS)
