"""The launcher on its own: what a broken or hostile service can and cannot do with it."""

import contextlib
import os
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobworker.config.settings import DEFAULT_ETC, SandboxSettings, Settings, WorkerSettings
from jobworker.errors import HostUnsupported, ProtocolError
from jobworker.sandbox import channel
from jobworker.sandbox.cgroup import hierarchy as cgroups
from jobworker.sandbox.cgroup.files import groups_called
from jobworker.sandbox.protocol.policy import LauncherPolicy, policy_message
from jobworker.sandbox.seccomp.compile import load_filters
from jobworker.sandbox.seccomp.profile import NEEDED_TO_START
from jobworker.sandbox.service import launch
from jobworker.sandbox.service.launch import LauncherProcess, start_launcher
from jobworker.server.host.id_ranges import lock_ids

from ..conftest import compiler
from ..services import FEW_PROGRAMS
from .conftest import child_of, disks_in

HELLO = """
static long call(long number, long a, long b, long c) {
#if defined(__x86_64__)
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c)
                     : "rcx", "r11", "memory");
    return result;
#else
    register long x8 __asm__("x8") = number, x0 __asm__("x0") = a;
    register long x1 __asm__("x1") = b, x2 __asm__("x2") = c;
    __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2) : "memory");
    return x0;
#endif
}
void _start(void) {
#if defined(__x86_64__)
    call(1, 1, (long)"hello\\n", 6); call(231, 0, 0, 0);
#else
    call(64, 1, (long)"hello\\n", 6); call(94, 0, 0, 0);
#endif
}
"""
"""A program that makes two calls, write(2) and exit_group(2)."""

Message = dict[str, object]


class Service:
    """The other end of the launcher's socket, with no manners of its own."""

    def __init__(self, launcher: LauncherProcess, policy: LauncherPolicy) -> None:
        self.process, self.sock, self.policy = launcher.process, launcher.sock, policy
        self.sock.setblocking(True)
        self.sock.settimeout(20)
        self._calls = 0
        self._exits: dict[object, Message] = {}

    def receive(self) -> tuple[Message, list[int]]:
        """The next message and its descriptors; a job's end is kept for `exit_of` as well."""
        received = channel.receive(self.sock)
        assert received is not None, "the launcher has left"
        if received[0].get("event") == "exit":
            self._exits[received[0]["job"]] = received[0]
        return received

    def reply_to(self, number: int) -> tuple[Message, list[int]]:
        """The reply to the request of that number, other words of the launcher's aside."""
        while True:
            message, descriptors = self.receive()
            if message.get("id") == number:
                return message, descriptors
            channel.close_all(descriptors)

    def ask(self, op: str, job: object, /, **fields: object) -> tuple[Message, list[int]]:
        """Send a request and take the reply to it, events aside."""
        self._calls += 1
        channel.send(self.sock, {"id": self._calls, "op": op, "job": job, **fields})
        message, descriptors = self.reply_to(self._calls)
        for descriptor in descriptors:
            os.set_blocking(descriptor, True)
        return message, descriptors

    def fields(self, *command: str) -> Message:
        """What a request for a job says, at its simplest."""
        return {
            "arguments": list(command),
            "environment": {},
            "hostname": "job",
            "workdir": "",
            "network": "host",
            "uid": 0,
            "gid": 0,
            "init": False,
            "cpu_percent": 0,
            "memory_bytes": 0,
            "io_bps": 0,
            "disk_bytes": 0,
            "runtime": "",
            "volumes": [],
            "pids": 0,
            "cores": "",
        }

    def spawn(self, job: int, *command: str, **changes: object) -> tuple[Message, list[int]]:
        """Ask for a job."""
        fields = {**self.fields(*command), "hostname": f"job-{job}"}
        return self.ask("spawn", job, **{**fields, **changes})

    def exit_of(self, job: int) -> Message:
        """Wait for the event of a job's end, or take it where it has come before."""
        while job not in self._exits:
            channel.close_all(self.receive()[1])
        return self._exits.pop(job)

    def leaves(self) -> int:
        """Wait for the launcher's end, and see that nothing of it is left: its exit code."""
        code = self.process.wait(timeout=20)
        assert groups_called(self.policy.instance) == []
        assert os.listdir(self.policy.scratch) == []
        assert disks_in(Path(self.policy.scratch)) == []
        return code


@pytest.fixture
def make_policy(open_directory: Callable[[], Path]) -> Iterator[Callable[..., LauncherPolicy]]:
    locks = []

    def make(programs: tuple[str, ...] = FEW_PROGRAMS) -> LauncherPolicy:
        directory = open_directory()
        (directory / "stage").mkdir()
        (directory / "scratch").mkdir()
        (directory / "volumes").mkdir()
        few = Settings(
            worker=WorkerSettings(max_concurrent_jobs=4),
            sandbox=SandboxSettings(first_uid=0, spares=1),
        )
        ids = lock_ids(few)
        locks.append(ids.descriptor)
        return LauncherPolicy(
            instance=f"jobworker-test-{directory.name[-8:]}",
            stage=str(directory / "stage"),
            scratch=str(directory / "scratch"),
            volumes=str(directory / "volumes"),
            controllers=("cpu", "memory", "io", "pids"),
            cgroup_parent="",
            programs=programs,
            etc=DEFAULT_ETC,
            first_uid=ids.first,
            max_jobs=4,
            spares=1,
            tmpfs_bytes=16 << 20,
            filters=load_filters(""),
            disk_bytes=64 << 20,
            keep_free_bytes=0,
            overcommit=True,
            runtimes={},
        )

    yield make
    channel.close_all(locks)


@pytest.fixture
def service(make_policy: Callable[..., LauncherPolicy]) -> Iterator[Service]:
    policy = make_policy()
    made = Service(start_launcher(policy), policy)
    yield made
    made.sock.close()
    assert made.leaves() == 0


def test_job_runs_and_is_cleared_away(service: Service) -> None:
    reply, descriptors = service.spawn(1, "sh", "-c", "echo out; echo err >&2; exit 3")
    assert "ok" in reply
    stdout, stderr = descriptors
    event = service.exit_of(1)
    assert (event["code"], event["signal"]) == (3, None)
    assert os.read(stdout, 100) == b"out\n"
    assert os.read(stderr, 100) == b"err\n"
    assert os.read(stdout, 100) == b""
    channel.close_all(descriptors)
    assert service.ask("remove", 1)[0]["ok"] == {}
    assert "error" in service.ask("usage", 1)[0]


@pytest.mark.parametrize(
    ("changes", "step"),
    [
        ({"workdir": "/nosuch"}, "change-directory"),
        ({"arguments": ["nosuch"]}, "execute"),
        ({"pids": 1 << 50}, "limits"),
    ],
)
def test_failed_start_names_its_step_and_leaves_room(
    service: Service, changes: Message, step: str
) -> None:
    for job in range(1, 12):  # more than there are slots: each one is given back
        reply, _ = service.spawn(job, "true", **changes)
        error = reply["error"]
        assert isinstance(error, dict)
        assert error["step"] == step, error
    assert "ok" in service.spawn(100, "true")[0]


def test_more_jobs_than_allowed_are_refused(service: Service) -> None:
    started = [service.spawn(job, "sleep", "60") for job in range(1, 9)]
    running = [reply for reply, _ in started if "ok" in reply]
    assert 4 <= len(running) <= 5, "the bound, and the spare's place"
    refused = [reply["error"] for reply, _ in started if "error" in reply]
    assert all("every place is in use" in str(error) for error in refused)
    for _, descriptors in started:
        channel.close_all(descriptors)


@pytest.mark.parametrize("wrong", [{"spares": "1"}, {"gpus": 1}])
def test_policy_that_it_cannot_take_is_refused_by_name(
    make_policy: Callable[..., LauncherPolicy], monkeypatch: pytest.MonkeyPatch, wrong: Message
) -> None:
    policy = make_policy()

    def written(policy: LauncherPolicy) -> Message:
        return {**policy_message(policy), **wrong}

    monkeypatch.setattr(launch, "policy_message", written)
    with pytest.raises(ProtocolError, match=f"cannot take the policy: .*{next(iter(wrong))}"):
        start_launcher(policy)


def test_id_in_use_is_refused(service: Service) -> None:
    channel.close_all(service.spawn(1, "sleep", "60")[1])
    assert "in use" in str(service.spawn(1, "true")[0]["error"])


def test_unknown_job_is_refused(service: Service) -> None:
    for operation in ("kill", "remove", "usage"):
        assert "no such job" in str(service.ask(operation, 77)[0]["error"])
    assert "no such job" in str(service.ask("signal", 77, signal=15)[0]["error"])


NAMED = r"""
trap 'exit 7' TERM
printf '\377\nSigCgt: 0' >/proc/$$/comm
echo named
while :; do sleep 0.01; done
"""


def test_signal_reaches_a_job_whose_name_is_no_text(service: Service) -> None:
    reply, descriptors = service.spawn(1, "sh", "-c", NAMED)
    assert "ok" in reply
    assert os.read(descriptors[0], 100) == b"named\n"
    ask = {"cause": "stop", "kill_in_ms": 60_000}
    assert service.ask("signal", 1, signal=signal.SIGTERM, **ask)[0]["ok"] == {"delivered": True}
    assert service.exit_of(1)["code"] == 7
    channel.close_all(descriptors)


def test_removing_a_live_job_kills_it(service: Service) -> None:
    _, descriptors = service.spawn(1, "sleep", "600")
    service.ask("remove", 1)
    while os.read(descriptors[0], 100):
        pass
    channel.close_all(descriptors)
    assert "ok" in service.spawn(1, "true")[0], "the id is free again"


BAD = [
    b"",
    b"x",
    b"i",
    b"i[]",
    b"i{",
    b"a",
    b'i{"id":1}',
    b'i{"id":1,"op":"mount","job":1}',
    b'i{"id":-1,"op":"kill","job":1}',
    b'i{"id":1,"op":"kill","job":true}',
    b'i{"id":1,"op":"signal","job":1,"signal":65}',
    b'i{"id":1,"op":"signal","job":1,"signal":0}',
    b'i{"id":1,"op":"spawn","job":1,"arguments":"ls"}',
    b'i{"id":1,"op":"spawn","job":1,"arguments":["a\\u0000b"]}',
    b"i" + b"[" * 30_000,
    b"\xff" * 100,
]


@pytest.mark.parametrize("packet", BAD)
def test_request_that_does_not_parse_ends_the_connection_and_all_jobs(
    service: Service, packet: bytes
) -> None:
    _, (stdout, stderr) = service.spawn(1, "sleep", "600")
    service.sock.send(packet)
    assert service.process.wait(timeout=20) == 0
    assert os.read(stdout, 1) == b"", "the job has ended"
    channel.close_all([stdout, stderr])


def attached(service: Service, descriptor: int) -> None:
    """Send a message whose body is said to be in `descriptor`."""
    socket.send_fds(service.sock, [b"a"], [descriptor])


def test_body_in_a_pipe_is_not_read(service: Service) -> None:
    read, write = os.pipe()  # reading it would block for ever
    attached(service, read)
    assert service.process.wait(timeout=20) == 0
    channel.close_all([read, write])


def test_body_in_memory_that_may_still_change_is_not_read(service: Service) -> None:
    unsealed = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.write(unsealed, b'{"id":1,"op":"kill","job":1}')
    attached(service, unsealed)
    assert service.process.wait(timeout=20) == 0
    os.close(unsealed)


def test_jobs_have_together_what_the_host_leaves_them_of_processes(service: Service) -> None:
    """The launcher's process namespace has a pid_max of its own, on Linux 6.14 and later."""
    groups = map(Path, groups_called(service.policy.instance))
    bounds = [(group / "pids.max").read_text() for group in groups if (group / "pids.max").exists()]
    assert bounds == [f"{cgroups.most_processes()}\n"]


def test_request_with_descriptors_ends_the_connection(service: Service) -> None:
    channel.send(service.sock, {"id": 5, "op": "usage", "job": 9}, [0, 1])
    assert service.process.wait(timeout=20) == 0


def test_descriptor_that_is_slow_to_close_delays_no_kill(service: Service) -> None:
    """SO_LINGER with unsent data makes the last close(2) wait, for as long as the sender says."""
    _, (stdout, stderr) = service.spawn(1, "sleep", "600")
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        peer, _ = server.accept()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 600))
        client.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                client.send(b"x" * 65_536)
        channel.send(service.sock, {"id": 5, "op": "usage", "job": 1}, [client.fileno()])
        os.close(client.detach())
        began = time.monotonic()
        assert os.read(stdout, 1) == b"", "the job has ended"
        assert time.monotonic() - began < 60
        peer.close()
    channel.close_all([stdout, stderr])
    service.process.wait(timeout=20)


def test_service_that_does_not_read_is_waited_for_without_blocking(service: Service) -> None:
    for number in range(1, 3000):
        channel.send(service.sock, {"id": number, "op": "usage", "job": 9})
    for number in range(1, 3000):
        received = channel.receive(service.sock)
        assert received is not None
        assert received[0]["id"] == number


def test_killed_service_takes_everything_along(service: Service) -> None:
    _, descriptors = service.spawn(1, "sh", "-c", "trap '' TERM; setsid sleep 600 & sleep 600")
    service.sock.shutdown(socket.SHUT_RDWR)
    assert service.leaves() == 0
    assert os.read(descriptors[0], 1) == b""
    channel.close_all(descriptors)


@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize(
    "command",
    [
        ["python3", "-c", "import ctypes, time; ctypes.CDLL(None).prctl(1, 0); time.sleep(600)"],
        ["sh", "-c", "exec setpriv --reuid 1000 --regid 1000 --clear-groups sleep 600"],
        ["sh", "-c", "setsid sleep 600 & exec sleep 600"],
    ],
)
def test_no_job_outlives_a_killed_launcher(
    service: Service, inner: bool, command: list[str]
) -> None:
    _, (stdout, stderr) = service.spawn(1, *command)
    guard = service.process.pid
    os.kill(child_of(guard) if inner else guard, signal.SIGKILL)
    service.process.wait(timeout=20)
    assert os.read(stdout, 1) == b"", "the last holder of the pipe is gone"
    channel.close_all([stdout, stderr])
    # What a killed launcher leaves on disk and in groups is cleared by the next one.
    service.sock.close()
    fresh = start_launcher(service.policy)
    service.process, service.sock = fresh.process, fresh.sock


def test_programs_that_do_not_exist_are_named(make_policy: Callable[..., LauncherPolicy]) -> None:
    if not Path("/bin").is_symlink():
        pytest.skip("needs a merged /usr: /bin would be shown in any case")
    policy = make_policy(programs=("/nosuch",))
    with pytest.raises(HostUnsupported, match="/nosuch"):
        start_launcher(policy)
    assert groups_called(policy.instance) == []


@pytest.fixture
def shown_directory() -> Iterator[Path]:
    """A directory where jobs have none of their own above it, so that it can be shown to them."""
    with tempfile.TemporaryDirectory(prefix="jobworker-test-", dir="/srv") as directory:
        os.chmod(directory, 0o755)
        yield Path(directory)


def test_profile_of_what_a_start_takes_is_enough_to_start_and_to_tell_why_not(
    make_policy: Callable[..., LauncherPolicy], shown_directory: Path
) -> None:
    programs = shown_directory
    source = programs / "hello.c"
    source.write_text(HELLO)
    build = [compiler(), "-static", "-nostdlib", "-o", str(programs / "hello"), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    calls = ", ".join(f'"{call}"' for call in sorted(NEEDED_TO_START))
    profile = f'newest_call = 469\n[[allow]]\nwhat = "a start"\ncalls = [{calls}]\n'
    (programs / "profile.toml").write_text(profile)
    policy = make_policy(programs=(str(programs),))
    policy = policy._replace(filters=load_filters(str(programs / "profile.toml")))
    service = Service(start_launcher(policy), policy)
    try:
        environment = {f"V{number}": "x" * 100_000 for number in range(5)}  # travels in a memfd
        reply, descriptors = service.spawn(1, str(programs / "hello"), environment=environment)
        assert "ok" in reply, reply
        stdout, stderr = descriptors
        assert service.exit_of(1)["code"] == 0
        assert os.read(stdout, 100) == b"hello\n"
        channel.close_all([stdout, stderr])
        for command, changes, step in (
            ("/nosuch", {}, "execute"),
            ("nosuch", {}, "execute"),
            (str(source), {}, "execute"),
            (str(programs / "hello"), {"workdir": "/nosuch"}, "change-directory"),
        ):
            reply, _ = service.spawn(2, command, **changes)
            assert reply["error"]["step"] == step, reply  # type: ignore[index]
    finally:
        service.sock.close()
        assert service.leaves() == 0


@pytest.mark.parametrize("program", [b"", bytes(8)])
def test_no_job_runs_without_a_filter(
    make_policy: Callable[..., LauncherPolicy], program: bytes
) -> None:
    policy = make_policy()
    policy = policy._replace(filters=policy.filters._replace(listed=program))
    with pytest.raises(HostUnsupported, match="filter"):
        start_launcher(policy)
    assert groups_called(policy.instance) == []


def test_launcher_is_small_and_of_one_thread(service: Service) -> None:
    status = Path(f"/proc/{child_of(service.process.pid)}/status").read_text()
    assert "Threads:\t1\n" in status
    maps = Path(f"/proc/{child_of(service.process.pid)}/maps").read_text()
    for foreign in ("libssl", "libsqlite3", "cryptography", "apsw"):
        assert foreign not in maps
    mounts = Path(f"/proc/{child_of(service.process.pid)}/mountinfo").read_text().splitlines()
    layers = [mount for mount in mounts if "/layers/" in mount]
    assert len(layers) <= len(FEW_PROGRAMS)
    assert len(mounts) - len(layers) < 8, "few mounts are copied for each job"


def test_environment_of_the_service_does_not_reach_the_launcher(service: Service) -> None:
    assert os.environ
    assert Path(f"/proc/{child_of(service.process.pid)}/environ").read_bytes() == b""
