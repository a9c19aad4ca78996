"""A job's output over as many connections as it takes, without gap or repeat.

Where a connection breaks, or the server lets a follower go that took nothing for too long, another
one goes on at the offset after the last chunk that was taken. The first connection must succeed:
what is wrong with an address or a certificate is told at once. Later ones are tried with growing
pauses, for `PATIENCE_SECONDS` since the last that worked.
"""

import random
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager

import trio
from attrs import define, field

from jobworker.client.client import Client
from jobworker.client.following import Chunk, Following
from jobworker.errors import Busy, ConnectionFailed, FollowerStalled, JobworkerError
from jobworker.model.job import JobId, JobRecord

FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 5.0
PATIENCE_SECONDS = 120.0

Connect = Callable[[], AbstractAsyncContextManager[Client]]
Begin = Callable[[Client], Awaitable[Following]]
Resume = Callable[[Client, JobId, int], Awaitable[Following]]
Take = Callable[[Chunk], Awaitable[None]]


@define(eq=False, kw_only=True)
class ResumingFollow:
    """One follow, from its first byte to the job's end.

    `begin` opens the subscription; where its Following has no job, `job` names it. `resume` opens
    a later one at an offset. `take` gets each chunk once, in order; what it raises ends the follow.
    `tell_lost` hears of each break before the pause that follows it.
    """

    _connect: Connect
    _begin: Begin
    _resume: Resume
    _take: Take
    _tell_started: Callable[[Following], Awaitable[None]]
    _tell_lost: Callable[[JobworkerError, int], None]
    job: JobId | None = None
    offset: int = 0
    _begun: bool = field(default=False, init=False)
    _pauses: int = field(default=0, init=False)
    _patience_ends: float = field(default=0, init=False)

    async def run(self) -> JobRecord:
        """Follow to the end: the job's final record.

        Raises what the first connection raises, what the server says of the output, and
        ConnectionFailed when patience ends.
        """
        while True:
            try:
                async with self._connect() as client:
                    return await self._follow(client)
            except (ConnectionFailed, Busy) as lost:
                await self._pause(lost)

    async def _follow(self, client: Client) -> JobRecord:
        while True:
            with await self._open(client) as output:
                self._pauses = 0
                try:
                    async for chunk in output:
                        await self._take(chunk)
                        self.offset = output.offset
                except FollowerStalled:  # it was the consumer that paused: go on
                    continue
                assert output.record is not None
                return output.record

    async def _open(self, client: Client) -> Following:
        if self._begun:
            assert self.job is not None
            return await self._resume(client, self.job, self.offset)
        output = await self._begin(client)
        if output.job is not None:
            self.job = output.job.id
        self.offset, self._begun = output.offset, True
        await self._tell_started(output)
        return output

    async def _pause(self, lost: JobworkerError) -> None:
        if not self._begun:
            raise lost
        if not self._pauses:
            self._patience_ends = trio.current_time() + PATIENCE_SECONDS
            self._tell_lost(lost, self.offset)
        elif trio.current_time() >= self._patience_ends:
            raise lost
        longest = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** min(self._pauses, 10))
        self._pauses += 1
        # Not all at once, where a restart broke many.
        await trio.sleep(longest * random.uniform(0.5, 1))  # noqa: S311
