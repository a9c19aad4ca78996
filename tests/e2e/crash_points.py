"""`worker`, killed by its own hand (SIGKILL) at a named point of a job's life.

    python crash_points.py POINT NAME serve --config FILE

It is the real program; at the point it stops existing, as it would by `kill -9` at that instant.
Only the job called NAME counts, so that what an earlier service has left does not trip it.
"""

import os
import signal
import sys
from collections.abc import Callable
from contextvars import ContextVar

if __name__ == "__main__":
    sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "src"))

from jobworker.cli.worker import main
from jobworker.jobs.execution import Execution
from jobworker.jobs.history.history import History
from jobworker.jobs.output.files import OutputFiles
from jobworker.jobs.output.index import RECORD, Record
from jobworker.jobs.output.index_file import IndexFile
from jobworker.jobs.output.spool import Spool
from jobworker.jobs.settlement import Settlement
from jobworker.model.job import JobRecord
from jobworker.model.lifecycle import State
from jobworker.sandbox.service.launcher_client import LauncherClient

for_the_victim = ContextVar("for_the_victim", default=False)
"""Whether this is a task of the victim's execution, or a thread that works for one."""


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("it lives on")


def watch(name: str) -> None:
    """Know the victim's tasks."""
    run = Execution.run

    async def patched(self: Execution) -> None:
        for_the_victim.set(self.record.spec.name == name)
        await run(self)

    setattr(Execution, "run", patched)  # noqa: B010 - mypy takes no assignment to a method


def at(owner: type, method: str, *, after: bool = False) -> None:
    """Die before, or after, a method is called for the victim."""
    original = getattr(owner, method)

    async def patched(*arguments: object) -> object:
        if for_the_victim.get() and not after:
            die()
        answer = await original(*arguments)
        if for_the_victim.get():
            die()
        return answer

    setattr(owner, method, patched)


def at_commit_of(state: State, *, after: bool = False) -> None:
    """Die before, or after, a transaction with the victim in a state is committed."""
    name, put = sys.argv[1], History.put

    async def patched(self: History, record: JobRecord, *, is_new: bool = False) -> None:
        concerned = record.spec.name == name and record.state is state
        if concerned and not after:
            die()
        await put(self, record, is_new=is_new)
        if concerned:
            die()

    setattr(History, "put", patched)  # noqa: B010


def between_splice_and_record() -> None:
    """Die when bytes are in a data file and the index does not know them."""
    show_written = OutputFiles._show_written

    def patched(self: OutputFiles, time_ns: int | None = None) -> None:
        if for_the_victim.get() and self.written_bytes > self.last.size:
            die()
        show_written(self, time_ns)

    setattr(OutputFiles, "_show_written", patched)  # noqa: B010


def within_a_record() -> None:
    """Die with a third of a record in the index."""
    put = IndexFile._put

    def patched(self: IndexFile, number: int, record: Record) -> None:
        if for_the_victim.get():
            os.pwrite(self.fd, record.pack()[:11], number * RECORD.size)
            die()
        put(self, number, record)

    setattr(IndexFile, "_put", patched)  # noqa: B010


POINTS: dict[str, Callable[[], None]] = {
    "before the admission is recorded": lambda: at_commit_of(State.INITIALIZING),
    "after the admission is recorded": lambda: at_commit_of(State.INITIALIZING, after=True),
    "before the start": lambda: at(LauncherClient, "spawn"),
    "after the start": lambda: at(LauncherClient, "spawn", after=True),
    "before RUNNING is recorded": lambda: at_commit_of(State.RUNNING),
    "after RUNNING is recorded": lambda: at_commit_of(State.RUNNING, after=True),
    "between splice and record": between_splice_and_record,
    "within a record of the index": within_a_record,
    "after the signal of a stop": lambda: at(LauncherClient, "signal", after=True),
    "before the seal": lambda: at(Spool, "seal"),
    "after the seal": lambda: at(Spool, "seal", after=True),
    "before the end is recorded": lambda: at_commit_of(State.FAILED),
    "after the end is recorded": lambda: at(Settlement, "_remove"),
    "after the removal": lambda: at(Settlement, "_remove", after=True),
}

if __name__ == "__main__":
    point = sys.argv.pop(1)
    watch(sys.argv[1])
    POINTS[point]()
    del sys.argv[1]
    main.main()
