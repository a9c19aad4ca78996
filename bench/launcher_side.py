"""A job's start as the launcher's client sees it: a launcher of its own, and no service.

The clock runs from the `spawn` request to the first byte on the pipe that the launcher handed
out, and to the notice of the end.
"""

import os
import select
import signal
import subprocess
import time
from pathlib import Path

from attrs import evolve

from jobworker.config.settings import Settings, with_first_uid
from jobworker.sandbox import channel
from jobworker.sandbox.cgroup.hierarchy import ScopeLimits
from jobworker.sandbox.service.launch import start_launcher
from jobworker.sandbox.start.plan import Order
from jobworker.server.host.id_ranges import lock_ids
from jobworker.server.startup.preparation import policy_for
from jobworker.server.startup.state_directory import make_state_directory

LIMITS = ScopeLimits(cpu_percent=100, memory_bytes=512 << 20, pids=1024)


class LauncherSide:
    """A client of a launcher that has the default settings."""

    def __init__(self, directory: Path, argv: list[str]) -> None:
        self._order, self._jobs = Order("job", tuple(argv), {}, ""), 0
        settings = Settings()
        settings = evolve(settings, worker=evolve(settings.worker, state_dir=str(directory)))
        make_state_directory(directory)
        ids = lock_ids(with_first_uid(settings, 0))
        policy = policy_for(with_first_uid(settings, ids.first), directory)
        self._launcher = start_launcher(policy, {"ids": ids.descriptor})
        os.close(ids.descriptor)
        self._launcher.sock.setblocking(True)

    def time(self) -> tuple[float, float]:
        """Seconds to the first output byte, and to the notice of the end."""
        self._jobs += 1
        began = time.perf_counter()
        order = self._order._replace(hostname=f"job-{self._jobs}")  # as the service names it
        told, pipes = self._ask("spawn", **order._asdict(), **LIMITS._asdict())
        select.select(pipes[:1], [], [])
        at_first = time.perf_counter() - began
        assert os.read(pipes[0], 1) == b"x", told
        channel.close_all(pipes)
        event = channel.receive(self._launcher.sock)
        whole = time.perf_counter() - began
        assert event is not None
        assert event[0]["code"] == 0, event
        self._ask("remove")
        return at_first, whole

    def time_kill(self, argv: list[str]) -> float:
        """Seconds from the request to kill a job that has said a word to the notice of its end."""
        self._jobs += 1
        order = self._order._replace(arguments=tuple(argv))
        _, pipes = self._ask("spawn", **order._asdict(), **LIMITS._asdict())
        select.select(pipes[:1], [], [])
        began = time.perf_counter()
        self._ask("kill")
        event = channel.receive(self._launcher.sock)
        seconds = time.perf_counter() - began
        channel.close_all(pipes)
        assert event is not None
        assert event[0]["signal"] == signal.SIGKILL, event
        self._ask("remove")
        return seconds

    def _ask(self, operation: str, **fields: object) -> tuple[channel.Message, list[int]]:
        request = {"id": self._jobs, "op": operation, "job": self._jobs, **fields}
        channel.send(self._launcher.sock, request)
        answer = channel.receive(self._launcher.sock)
        assert answer is not None
        assert "ok" in answer[0], answer
        return answer

    def close(self) -> None:
        """End the launcher."""
        self._launcher.sock.close()
        process: subprocess.Popen[bytes] = self._launcher.process
        process.wait()
