"""Before Trio runs: start a launcher of the service's own, or find the one that runs already.

`start_launcher` is for a launcher that ends with the service, `connect_launcher` for one that
outlives services: it tells of the jobs that an earlier service has left, and hands over their
pipes. Both wait, with a bound, until the launcher is ready. `sandbox.service.link` goes on from
there.

The launcher says of a moment how long ago it was. That is made a time of this host's monotonic
clock at once (time.monotonic), since much may pass before somebody asks.
"""

import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TypedDict

from attrs import Factory, evolve, frozen

import jobworker
from jobworker.errors import HostUnsupported, LauncherGone, error_classes
from jobworker.model.job import Usage
from jobworker.sandbox import channel
from jobworker.sandbox.cgroup.scope import Want
from jobworker.sandbox.protocol.policy import Policy, policy_message
from jobworker.sandbox.protocol.version import PROTOCOL, mismatch

START_SECONDS = 30
_SILENT = (
    "it is there and does not answer: see what holds it (ps, systemctl status worker-launcher), "
    "then start the service again"
)
_ABSENT = (
    "see whether it runs (ps, systemctl status worker-launcher); if not, start it (worker "
    "launcher, or systemctl start worker-launcher), and if so, its socket was removed: let its "
    "jobs end and start it anew. Or leave launcher.socket empty for a launcher of the service's own"
)
NO_LOCKS: Mapping[str, int] = MappingProxyType({})
_BOOTSTRAP = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from jobworker.sandbox.launcher.main import main; main(int(sys.argv[2]))"
)


@frozen(kw_only=True)
class Exit:
    """How a job's first process ended: its code, or the signal that ended it."""

    code: int | None
    signal: int | None
    usage: Usage | None
    """None where it could not be read."""
    lost: tuple[str, ...] = ()
    """Where it lost some of what it wrote: names of volumes, "" for its own disk."""
    unseen: tuple[str, ...] = ()
    """Names of volumes of which that could not be found out."""
    want: Want = ""
    """For want of what memory processes of it were killed."""
    ended_at: float = Factory(time.monotonic)

    @property
    def seconds_ago(self) -> float:
        """How long ago it ended."""
        return time.monotonic() - self.ended_at


@frozen(kw_only=True)
class AskedBefore:
    """What an earlier service has asked for of a job's end: see `sandbox.protocol.asks`."""

    cause: str
    first_at: float
    kill_at: float
    signals: frozenset[int]
    """The signals that were sent for it."""

    @property
    def seconds_ago(self) -> float:
        """How long ago that was asked for first."""
        return time.monotonic() - self.first_at

    @property
    def kill_in_seconds(self) -> float:
        """When the job is to be killed; negative where that was due already."""
        return self.kill_at - time.monotonic()


@frozen(kw_only=True)
class Listed:
    """A job that the launcher has kept, and the read ends of its pipes."""

    job: int
    pid: int
    since: float
    """When its program was started."""
    exit: Exit | None
    """None while it lives."""
    stdout: int
    stderr: int
    network_end: str = ""
    """Why it lost its private network, if it did."""
    asked: AskedBefore | None = None
    """None where nobody asked for its end, or an earlier launcher did not keep that."""


@frozen(kw_only=True)
class OpenedLauncher:
    """A launcher that is ready: our end of its socket, and what it has told of itself."""

    sock: socket.socket
    cgroup_kind: str
    gaps: tuple[str, ...]
    """What this host cannot enforce, in words."""
    policy: Mapping[str, object]
    """What it was told at its start, as `policy_message` writes it."""
    bounds_disks: bool
    """Whether each job has a disk of its own."""
    keeps_asks: bool = False
    """Whether it takes and keeps why a job is sent a signal, and gives up starts that nobody wants
    any more: one of before does not."""
    jobs: tuple[Listed, ...] = ()
    unstarted: frozenset[int] = frozenset()
    """Jobs that it was to start and whose program was not executed: the latest that it knows."""

    def close(self) -> None:
        """Close our end of the socket and the jobs' pipes: for a start that fails."""
        self.sock.close()
        for job in self.jobs:
            channel.close_all([job.stdout, job.stderr])


@frozen(kw_only=True)
class LauncherProcess(OpenedLauncher):
    """A launcher that this process has started, and that ends with it."""

    process: subprocess.Popen[bytes]


def launcher_command(descriptor: int) -> list[str]:
    """The command that runs a launcher on an inherited socket."""
    source = str(Path(jobworker.__file__).resolve().parent.parent)
    return [sys.executable, "-I", "-S", "-B", "-c", _BOOTSTRAP, source, str(descriptor)]


def start_launcher(policy: Policy, locks: Mapping[str, int] = NO_LOCKS) -> LauncherProcess:
    """Start a launcher and wait until it is ready; raises what it could not do.

    It holds the descriptors `locks`, by name, as long as it lives. Call as root, from a process of
    one thread, before Trio runs.
    """
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with far:
        process = subprocess.Popen(
            launcher_command(far.fileno()),
            pass_fds=[far.fileno()],
            stdin=subprocess.DEVNULL,
            env={},
            cwd="/",
            start_new_session=True,  # Ctrl-C is the service's to handle
        )
    try:
        near.settimeout(START_SECONDS)
        message = {**policy_message(policy), "carries": list(locks)}
        channel.send(near, message, list(locks.values()))
        hello = _hello(near)
        near.setblocking(False)
        return LauncherProcess(process=process, sock=near, **_facts(hello))
    except TimeoutError:
        near.close()
        process.kill()
        process.wait()
        raise HostUnsupported(
            f"cannot start the launcher: no word from it within {START_SECONDS} s"
        ) from None
    except BaseException:
        near.close()
        process.wait()
        raise


def connect_launcher(path: str) -> OpenedLauncher:
    """Connect to the launcher that listens at `path`, and take over the jobs that it has kept.

    Raises LauncherGone where there is none, and what the launcher refuses: Busy while another
    service is connected.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pipes: list[int] = []
    try:
        sock.settimeout(START_SECONDS)
        sock.connect(path)
        _check_is_roots(sock, path)
        hello = _hello(sock)
        jobs, unstarted = _list(sock, pipes)
        sock.setblocking(False)
        return OpenedLauncher(sock=sock, jobs=jobs, unstarted=unstarted, **_facts(hello))
    except OSError as error:
        sock.close()
        channel.close_all(pipes)
        silent = isinstance(error, TimeoutError)
        why = f"no answer within {START_SECONDS} s" if silent else error.strerror or error
        raise LauncherGone(
            f"cannot reach the launcher at {path}: {why}", remedy=_SILENT if silent else _ABSENT
        ) from error
    except BaseException as error:
        sock.close()
        cut = error.descriptors if isinstance(error, channel.BadMessage) else []
        channel.close_all([*pipes, *cut])
        raise


def _check_is_roots(sock: socket.socket, path: str) -> None:
    """Whoever listens there will be told every command: it must be root (SO_PEERCRED)."""
    credentials = struct.Struct("iII")
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size)
    uid = credentials.unpack(raw)[1]
    if uid != 0:
        raise HostUnsupported(
            f"cannot use the launcher at {path}: it runs as user {uid}, not as root",
            remedy="see who has put a socket there, and set launcher.socket to a path below a "
            "directory that only root may write to",
        )


def _hello(sock: socket.socket) -> channel.Message:
    received = channel.receive(sock)
    if received is None:
        raise HostUnsupported("cannot start the launcher: it ended without a word")
    hello = received[0]
    problem = hello.get("error")
    if isinstance(problem, dict):
        cls = error_classes().get(problem["code"], HostUnsupported)
        raise cls(problem["message"], remedy=problem["remedy"])
    _check_version(mismatch(hello.get("protocol"), PROTOCOL))
    channel.send(sock, {"id": 0, "op": "hello", "protocol": PROTOCOL})
    while True:
        received = channel.receive(sock)
        if received is None:
            raise HostUnsupported("cannot start the launcher: it ended without a word")
        message, descriptors = received
        channel.close_all(descriptors)  # of the end of a job, which `list` tells again
        if message.get("id") == 0:
            refused = message.get("error")
            _check_version(str(refused["detail"]) if isinstance(refused, dict) else "")
            return hello


def _check_version(problem: str) -> None:
    if problem:
        raise HostUnsupported(
            f"cannot use the launcher: {problem}",
            remedy="start both anew after an upgrade; a launcher of its own ends its jobs then",
        )


class _Facts(TypedDict):
    keeps_asks: bool
    cgroup_kind: str
    gaps: tuple[str, ...]
    policy: Mapping[str, object]
    bounds_disks: bool


def _facts(hello: channel.Message) -> _Facts:
    gaps, policy = hello["gaps"], hello["policy"]
    assert isinstance(gaps, list)
    assert isinstance(policy, dict)
    return {
        "cgroup_kind": str(hello["ready"]),
        "gaps": tuple(gaps),
        "policy": policy,
        "bounds_disks": hello["bounds_disks"] is True,
        "keeps_asks": hello.get("keeps_asks") is True,
    }


def _list(sock: socket.socket, pipes: list[int]) -> tuple[tuple[Listed, ...], frozenset[int]]:
    """Ask for all jobs, page by page, and for those whose program was not executed.

    Every pipe that comes along is also put into `pipes`.
    """
    jobs: dict[int, Listed] = {}
    unstarted = frozenset[int]()
    number, more = 0, True
    while more:
        number += 1
        channel.send(sock, {"id": number, "op": "list", "after": max(jobs, default=0)})
        reply: object = None
        while reply is None:
            received = channel.receive(sock)
            if received is None:
                raise ConnectionResetError("it has ended")
            message, descriptors = received
            pipes += descriptors
            if message.get("event") == "exit":  # of one on an earlier page
                _note_end(jobs, message)
            elif message.get("id") == number:
                reply = message.get("ok")
        assert isinstance(reply, dict)
        for entry, stdout, stderr in zip(
            reply["jobs"], descriptors[::2], descriptors[1::2], strict=True
        ):
            jobs[entry["job"]] = _listed(entry, stdout, stderr)
        more = bool(reply["more"])
        unstarted = frozenset(reply.get("unstarted", []))  # an earlier launcher does not tell
    return tuple(jobs.values()), unstarted


def _listed(entry: channel.Message, stdout: int, stderr: int) -> Listed:
    job, pid, age_seconds, end = (entry[k] for k in ("job", "pid", "age_seconds", "exit"))
    assert isinstance(job, int)
    assert isinstance(pid, int)
    assert isinstance(age_seconds, float)
    assert isinstance(end, dict | None)
    return Listed(
        job=job,
        pid=pid,
        since=time.monotonic() - age_seconds,
        exit=None if end is None else exit_from({**entry, **end}),
        stdout=stdout,
        stderr=stderr,
        network_end=str(entry.get("network_end", "")),  # an earlier launcher does not tell
        asked=_asked_from(entry.get("asked")),
    )


def _asked_from(told: object) -> AskedBefore | None:
    if not isinstance(told, dict):
        return None
    now = time.monotonic()
    return AskedBefore(
        cause=str(told["cause"]),
        first_at=now - float(told["seconds_ago"]),
        kill_at=now + float(told["kill_in_seconds"]),
        signals=frozenset(map(int, told["signals"])),
    )


def _note_end(jobs: dict[int, Listed], message: channel.Message) -> None:
    job = message["job"]
    assert isinstance(job, int)
    if job in jobs:
        jobs[job] = evolve(jobs[job], exit=exit_from(message))


def exit_from(message: Mapping[str, object]) -> Exit:
    """How a job ended, as the launcher's messages tell it."""
    code, number, usage = message["code"], message["signal"], message["usage"]
    assert isinstance(code, int | None)
    assert isinstance(number, int | None)
    assert isinstance(usage, dict)
    # An earlier launcher does not tell.
    lost, unseen = message.get("lost", []), message.get("unseen", [])
    ago = message.get("ended_seconds_ago", 0.0)
    assert isinstance(lost, list)
    assert isinstance(unseen, list)
    assert isinstance(ago, float)
    used = usage_from(usage)
    return Exit(
        code=code,
        signal=number,
        usage=None if message.get("measured") is False else used,
        lost=tuple(map(str, lost)),
        unseen=tuple(map(str, unseen)),
        want=_want_from(message.get("want"), used),
        ended_at=time.monotonic() - ago,
    )


def _want_from(told: object, usage: Usage) -> Want:
    """What an earlier launcher does not tell is taken for the job's own limit."""
    match told:
        case "" | "host" | "kernel":
            return told
    return "limit" if usage.oom_kills else ""


def usage_from(message: Mapping[str, object]) -> Usage:
    """What a job has used, as the launcher's messages tell it."""
    numbers = {key: value for key, value in message.items() if isinstance(value, int)}
    numbers["processes"] = numbers.pop("pids")
    return Usage(**numbers)
