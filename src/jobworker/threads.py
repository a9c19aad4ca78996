"""Run blocking work in a worker thread; wait while the system refuses the process another thread.

A limit on the processes of a service (`TasksMax=`, RLIMIT_NPROC) counts its threads too. At the
limit, clone(2) fails with EAGAIN, but only for a moment: a thread that ends its work can be used
again. Such a moment must neither end a job nor reach a client as an error.
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
LOG_EVERY_SECONDS = 60.0
REFUSED = "can't start new thread"
"""The message of the RuntimeError that `threading` raises for EAGAIN; it carries no errno."""


@frozen
class _Prompt:
    """A capacity limiter without the checkpoint that trio's own makes even where it has room."""

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
    """Run `work` as `trio.to_thread.run_sync` does, but wait while no thread can be started.

    The work is started once: whatever it raises, it is not tried again.
    """
    begun = False

    def begin() -> T:
        nonlocal begun
        begun = True
        return work(*arguments)

    log_at = trio.current_time()
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
        if trio.current_time() >= log_at:
            log_at = trio.current_time() + LOG_EVERY_SECONDS
            log.error(
                "the system refuses a thread: waiting for one "
                "(raise the limit of processes: TasksMax=, ulimit -u, pids.max)"
            )
        await trio.sleep(AGAIN_SECONDS)
