"""The longest turn of a service's event loop, by an instrument inside of it.

A turn is one step of one task: as long as it lasts, no other task of the service runs. Counted is
the processor's time of the loop's own thread, so that a busy machine makes no turn longer.

    with watched_turns() as turns:
        ...start a service as a child process, which takes over the environment...
        turns.reset()
        ...
        turns.longest_ms(), turns.task()
"""

import mmap
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attrs import frozen

VARIABLE = "JOBWORKER_BENCH_TURNS"
_PLACE = struct.Struct("=d64s")

_INSIDE = """
import os, struct, sys, time
path = os.environ.get("JOBWORKER_BENCH_TURNS")
if path and sys.argv[1:2] == ["serve"] or path and "serve" in sys.argv:
    import mmap, trio
    with open(path, "r+b") as file:
        shared = mmap.mmap(file.fileno(), 4096)
    place = struct.Struct("=d64s")

    class Turns(trio.abc.Instrument):
        def before_task_step(self, task):
            self.began = time.thread_time()

        def after_task_step(self, task):
            took = time.thread_time() - self.began
            if took > place.unpack_from(shared)[0]:
                place.pack_into(shared, 0, took, task.name.encode()[-64:])

    plain = trio.run
    trio.run = lambda *args, **options: plain(*args, **{**options, "instruments": [Turns()]})
"""


@frozen
class Turns:
    """What the instrument tells."""

    _shared: mmap.mmap

    def reset(self) -> None:
        """Forget the longest turn."""
        _PLACE.pack_into(self._shared, 0, 0.0, b"")

    def longest_ms(self) -> float:
        """The longest turn since the last reset, in milliseconds."""
        return float(_PLACE.unpack_from(self._shared)[0]) * 1e3

    def task(self) -> str:
        """The name of the task whose turn that was."""
        return bytes(_PLACE.unpack_from(self._shared)[1]).rstrip(b"\0").decode()


@contextmanager
def watched_turns() -> Iterator[Turns]:
    """Have services that are started in the block watched; one of them at a time."""
    before = {name: os.environ.get(name) for name in (VARIABLE, "PYTHONPATH")}
    with tempfile.TemporaryDirectory(prefix="jobworker-turns-", dir="/var/tmp") as made:
        directory = Path(made)
        directory.chmod(0o755)
        (directory / "sitecustomize.py").write_text(_INSIDE)
        path = directory / "turns"
        path.write_bytes(bytes(mmap.PAGESIZE))
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 4096) as shared:
            os.environ[VARIABLE] = str(path)
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [made, before["PYTHONPATH"]]))
            try:
                yield Turns(shared)
            finally:
                for name, value in before.items():
                    os.environ.pop(name, None)
                    if value is not None:
                        os.environ[name] = value
