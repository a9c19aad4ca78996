"""Starts a launcher of the service's own, or connects to one that runs already; before Trio runs.

`start_launcher` starts a launcher that ends with the service. `connect_launcher` connects to one
that outlives services: it lists the jobs that an earlier service has left, and sends their pipes.
Both wait until the launcher is ready, at most `START_SECONDS` for each of its answers. The caller
then passes the socket to `sandbox.service.launcher_client`.
"""

import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TypedDict

from attrs import evolve, frozen

import jobworker
from jobworker.errors import HostUnsupported, LauncherGone, error_classes
from jobworker.sandbox import channel
from jobworker.sandbox.protocol import events, greeting, requests
from jobworker.sandbox.protocol import operations as ops
from jobworker.sandbox.protocol.fields import Malformed
from jobworker.sandbox.protocol.greeting import Ready
from jobworker.sandbox.protocol.policy import LauncherPolicy, policy_message
from jobworker.sandbox.protocol.replies import JobEntries, Refusal
from jobworker.sandbox.protocol.version import PROTOCOL, mismatch
from jobworker.sandbox.service.job_reports import KeptJob, exit_from, kept_job_from
from jobworker.sandbox.service.launcher_refusals import explain

START_SECONDS = 30
_SILENT = (
    "it runs and does not answer: see what holds it (ps, systemctl status worker-launcher), "
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
class OpenedLauncher:
    """A launcher that is ready: the service's end of its socket, and the facts of its greeting."""

    sock: socket.socket
    cgroup_kind: str
    """The kind of its control groups, such as "v2"."""
    gaps: tuple[str, ...]
    """What this host cannot enforce, as sentences for the log."""
    policy: Mapping[str, object]
    """The policy of its start, as `policy_message` writes it."""
    bounds_disks: bool
    """Whether each job has a disk of its own."""
    keeps_asks: bool = False
    """Whether it keeps the reason of a signal for the next service, and can give up a start. A
    launcher of an earlier version does neither."""
    jobs: tuple[KeptJob, ...] = ()
    """The jobs that it has kept."""
    unstarted: frozenset[int] = frozenset()
    """The latest jobs that it should start and whose program was not executed."""

    def close(self) -> None:
        """Close the socket and the jobs' pipes: for a service whose start fails."""
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


def start_launcher(policy: LauncherPolicy, locks: Mapping[str, int] = NO_LOCKS) -> LauncherProcess:
    """Start a launcher and wait until it is ready.

    It keeps the descriptors `locks`, by name, open as long as it runs. The caller is root, has one
    thread, and has not started Trio yet. Raises HostUnsupported if the launcher is not ready within
    `START_SECONDS`, and the error that it sends if it cannot run jobs here.
    """
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with far:
        process = subprocess.Popen(
            launcher_command(far.fileno()),
            pass_fds=[far.fileno()],
            stdin=subprocess.DEVNULL,
            env={},
            cwd="/",
            start_new_session=True,  # so that Ctrl-C reaches the service only
        )
    try:
        near.settimeout(START_SECONDS)
        message = {**policy_message(policy), "carries": list(locks)}
        channel.send(near, message, list(locks.values()))
        hello = _greet(near)
        near.setblocking(False)
        return LauncherProcess(process=process, sock=near, **_facts(hello))
    except TimeoutError:
        near.close()
        process.kill()
        process.wait()
        raise HostUnsupported(
            f"cannot start the launcher: no answer within {START_SECONDS} s"
        ) from None
    except BaseException:
        near.close()
        process.wait()
        raise


def connect_launcher(path: str) -> OpenedLauncher:
    """Connect to the launcher that listens at `path`, and get the jobs that it has kept.

    Raises LauncherGone if none answers there, HostUnsupported if the launcher is not root's or has
    another protocol, and the error that the launcher sends: Busy while another service is
    connected.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pipes: list[int] = []
    try:
        sock.settimeout(START_SECONDS)
        sock.connect(path)
        _check_is_roots(sock, path)
        hello = _greet(sock)
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
    """Raise HostUnsupported if the listening process is not root's, by SO_PEERCRED of unix(7).

    The service sends every job's command and variables to it.
    """
    credentials = struct.Struct("iII")
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size)
    uid = credentials.unpack(raw)[1]
    if uid != 0:
        raise HostUnsupported(
            f"cannot use the launcher at {path}: it runs as user {uid}, not as root",
            remedy="see who has put a socket there, and set launcher.socket to a path below a "
            "directory that only root may write to",
        )


def _greet(sock: socket.socket) -> Ready:
    """Exchange greetings with the launcher, and return its facts. Raises the error of a refusal."""
    hello = _receive_first(sock)[0]
    with _checked_protocol():
        refused = greeting.refusal_in(hello)
    if refused is not None:
        cls = error_classes().get(refused.code, HostUnsupported)
        raise cls(refused.message, remedy=refused.remedy)
    _check_version(mismatch(hello.get("protocol"), PROTOCOL))
    with _checked_protocol():
        ready = greeting.ready_from(hello)
    channel.send(sock, ops.request_message(0, requests.Hello(PROTOCOL)))
    while True:
        message, descriptors = _receive_first(sock)
        channel.close_all(descriptors)  # of the end of a job, which the list of jobs reports again
        if message.get("id") == 0:
            with _checked_protocol():
                reply = ops.read_reply(ops.HELLO, message)
            _check_version(reply.detail if isinstance(reply, Refusal) else "")
            return ready


def _receive_first(sock: socket.socket) -> tuple[channel.Message, list[int]]:
    received = channel.receive(sock)
    if received is None:
        raise HostUnsupported("cannot start the launcher: it ended without an answer")
    return received


def _check_version(problem: str) -> None:
    if problem:
        raise HostUnsupported(
            f"cannot use the launcher: {problem}",
            remedy="start both anew after an upgrade; a launcher of its own ends its jobs then",
        )


@contextmanager
def _checked_protocol() -> Iterator[None]:
    """Raise HostUnsupported for a message of the launcher that its protocol does not allow."""
    try:
        yield
    except Malformed as fault:
        raise HostUnsupported(
            f"cannot use the launcher: it does not keep to the protocol: {fault}",
            remedy="report this fault, with the versions of service and launcher",
        ) from None


class _Facts(TypedDict):
    keeps_asks: bool
    cgroup_kind: str
    gaps: tuple[str, ...]
    policy: Mapping[str, object]
    bounds_disks: bool


def _facts(ready: Ready) -> _Facts:
    return {
        "cgroup_kind": ready.kind,
        "gaps": ready.gaps,
        "policy": ready.policy,
        "bounds_disks": ready.bounds_disks,
        "keeps_asks": ready.keeps_asks,
    }


def _list(sock: socket.socket, pipes: list[int]) -> tuple[tuple[KeptJob, ...], frozenset[int]]:
    """All jobs, requested page by page, and the numbers of those whose program was not executed.

    Appends every received pipe to `pipes`, so that the caller can close them after an error.
    """
    jobs: dict[int, KeptJob] = {}
    number, page = 0, None
    while page is None or page.more:
        number += 1
        request = requests.ListJobs(after=max(jobs, default=0))
        channel.send(sock, ops.request_message(number, request))
        with _checked_protocol():
            page, descriptors = _page(sock, number, jobs, pipes)
        for entry, stdout, stderr in zip(
            page.jobs, descriptors[::2], descriptors[1::2], strict=True
        ):
            jobs[entry.job] = kept_job_from(entry, stdout, stderr)
    return tuple(jobs.values()), frozenset(page.unstarted)


def _page(
    sock: socket.socket, number: int, jobs: dict[int, KeptJob], pipes: list[int]
) -> tuple[JobEntries, list[int]]:
    """The reply to the request `number` for a page, and its pipes.

    A job of an earlier page that ends meanwhile gets its end in `jobs`. Raises Malformed, and the
    error of a refusal.
    """
    while True:
        received = channel.receive(sock)
        if received is None:
            raise ConnectionResetError("it has ended")
        message, descriptors = received
        pipes += descriptors
        if message.get("id") == number:
            page = ops.read_reply(ops.LIST, message)
            if isinstance(page, Refusal):
                raise explain(page)
            if len(descriptors) != 2 * len(page.jobs):
                raise Malformed(f"{len(page.jobs)} jobs came with {len(descriptors)} descriptors")
            return page, descriptors
        event = events.read(message)
        if isinstance(event, events.JobEnded) and event.job in jobs:
            jobs[event.job] = evolve(jobs[event.job], exit=exit_from(event))
