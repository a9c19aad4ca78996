"""A launcher that runs on its own: what services that come, go and misbehave can do with it."""

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobworker.cli.worker.embedded_service import program
from jobworker.errors import Busy, LauncherGone, PermissionDenied
from jobworker.sandbox import channel
from jobworker.sandbox.service.job_reports import KeptJob
from jobworker.sandbox.service.launch import OpenedLauncher, connect_launcher
from jobworker.server.startup.preparation import instance_name

from .conftest import child_of, children_of, left_behind, settled, until
from .outside import Extra, open_launcher

Message = dict[str, object]

ORDER: Message = {
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


@pytest.fixture
def site(open_directory: Callable[[], Path]) -> Iterator[Path]:
    """A directory with a running launcher; at the end nothing of it may be left."""
    directory = open_directory()
    with open_launcher(directory, {"worker": {"max_concurrent_jobs": 20}}):
        yield directory
    assert left_behind(directory) == []


def connect(site: Path) -> OpenedLauncher:
    opened = connect_launcher(str(site / "launcher.sock"))
    opened.sock.settimeout(20)
    return opened


def ask(sock: socket.socket, op: str, job: int, **fields: object) -> tuple[Message, list[int]]:
    """Send a request and take its reply, events aside."""
    channel.send(sock, {"id": 7, "op": op, "job": job, **fields})
    while True:
        received = channel.receive(sock)
        assert received is not None
        if received[0].get("id") == 7:
            return received


def spawn(sock: socket.socket, job: int, *command: str, **more: object) -> tuple[int, int]:
    """Start a job: its pipes."""
    order = {**ORDER, "arguments": list(command), **more}
    reply, descriptors = ask(sock, "spawn", job, **order)
    assert "ok" in reply, reply
    for descriptor in descriptors:
        os.set_blocking(descriptor, True)
    return descriptors[0], descriptors[1]


def reconnect_when_free(site: Path) -> OpenedLauncher:
    """Connect after a connection that the launcher may not have seen the end of yet."""
    deadline = time.monotonic() + 20
    while True:
        try:
            return connect(site)
        except Busy:
            assert time.monotonic() < deadline


def only(opened: OpenedLauncher) -> KeptJob:
    (job,) = opened.jobs
    return job


def test_socket_is_roots_alone_where_the_service_has_an_id_of_its_own(site: Path) -> None:
    """It takes that id after it has called."""
    status = (site / "launcher.sock").stat()
    assert (status.st_mode & 0o777, status.st_uid) == (0o600, 0)


def test_job_outlives_the_connection_and_is_told_to_the_next(site: Path) -> None:
    first = connect(site)
    assert first.jobs == ()
    pipes = spawn(first.sock, 5, "sh", "-c", "echo one; read x </dev/null; echo two; exec sleep 60")
    first.close()
    second = reconnect_when_free(site)
    job = only(second)
    assert (job.job, job.exit) == (5, None)
    assert time.monotonic() - job.since < 20
    os.set_blocking(job.stdout, True)
    data = b""
    while data != b"one\ntwo\n":
        data += os.read(job.stdout, 100)
    assert ask(second.sock, "remove", 5)[0]["ok"] == {}
    assert os.read(job.stdout, 1) == b""
    channel.close_all(pipes)
    second.close()


def test_exit_status_waits_for_the_next_service(site: Path) -> None:
    first = connect(site)
    stdout, stderr = spawn(first.sock, 1, "sh", "-c", "echo last; exit 7")
    first.close()
    channel.close_all([stdout, stderr])
    while True:
        second = reconnect_when_free(site)
        job = only(second)
        if job.exit is not None:
            break
        second.close()
    assert (job.exit.code, job.exit.signal) == (7, None)
    assert os.read(job.stdout, 100) == b"last\n"
    assert ask(second.sock, "remove", 1)[0]["ok"] == {}
    second.close()


def test_more_jobs_than_fit_a_page_are_all_listed_with_their_own_pipes(site: Path) -> None:
    first = connect(site)
    for number in range(1, 20):
        channel.close_all(spawn(first.sock, number, "sh", "-c", f"echo {number}; exec sleep 60"))
    first.close()
    second = reconnect_when_free(site)
    assert [job.job for job in second.jobs] == list(range(1, 20))
    for job in second.jobs:
        os.set_blocking(job.stdout, True)
        assert os.read(job.stdout, 100) == f"{job.job}\n".encode()
    second.close()


def test_second_service_is_refused_by_name_while_one_is_there(site: Path) -> None:
    first = connect(site)
    with pytest.raises(Busy, match="another service is connected"):
        connect(site)
    assert "no such job" in str(ask(first.sock, "usage", 9)[0]), "the first one is served on"
    first.close()
    reconnect_when_free(site).close()


_CALL = """
import os, socket, sys
os.setgroups([]); os.setresgid(*[12345] * 3); os.setresuid(*[12345] * 3)
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sock.connect(sys.argv[1])
print(sock.recv(10_000).decode())
"""


def test_other_users_are_refused_even_where_the_file_lets_them_in(site: Path) -> None:
    path = site / "launcher.sock"
    command = [sys.executable, "-I", "-S", "-c", _CALL, str(path)]
    before = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    if "No module" in before.stderr or "Permission denied: '/" in before.stderr:
        pytest.skip("needs a Python that every user may run")
    assert "Permission denied" in before.stderr, "the mode keeps them out"
    path.chmod(0o666)
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    assert f'"code":{PermissionDenied.code}' in done.stdout
    assert "user 12345 is not its service's" in done.stdout
    connect(site).close()


@pytest.mark.parametrize(
    "packet",
    [b"", b"x", b"i{", b'i{"id":1,"op":"mount","job":1}', b'i{"id":1,"op":"list","after":-1}'],
)
def test_request_that_does_not_parse_ends_its_connection_and_no_job(
    site: Path, packet: bytes
) -> None:
    first = connect(site)
    pipes = spawn(first.sock, 1, "sleep", "600")
    first.sock.send(packet)
    assert channel.receive(first.sock) is None
    first.close()
    second = reconnect_when_free(site)
    assert only(second).exit is None
    second.close()
    channel.close_all(pipes)


def test_descriptors_that_are_slow_to_close_delay_nobody(site: Path) -> None:
    """SO_LINGER with unsent data makes the last close(2) wait, for as long as the sender says:
    of what was received, and of what still stands unread in the connection that is closed."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        first = connect(site)
        slow, peers = [], []
        for _ in range(3):
            slow.append(socket.create_connection(server.getsockname()))
            peers.append(server.accept()[0])
            slow[-1].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 60))
            slow[-1].setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    slow[-1].send(b"x" * 65_536)
        launcher = child_of(guard_of(site))
        os.kill(launcher, signal.SIGSTOP)  # so that it finds all three at once
        for client in slow:
            channel.send(first.sock, {"id": 5, "op": "usage", "job": 1}, [client.fileno()])
            os.close(client.detach())
        os.kill(launcher, signal.SIGCONT)
        first.close()
        began = time.monotonic()
        second = reconnect_when_free(site)
        assert "no such job" in str(ask(second.sock, "usage", 1)[0])
        assert time.monotonic() - began < 20
        second.close()
        for peer in peers:
            peer.close()


async def test_connections_by_the_hundred_leave_nothing_open(site: Path) -> None:
    launcher = child_of(guard_of(site))
    connect(site).close()
    before = settled(lambda: standing(launcher))
    for number in range(300):
        opened = reconnect_when_free(site)
        if number % 3 == 0:
            opened.sock.send(b"x")
        opened.close()
    await until(lambda: standing(launcher) == before)


def guard_of(site: Path) -> int:
    """The launcher's guard: of those who hold the launcher's lock, the parent of the others."""
    lock = (site / "state" / "launcher.lock").stat()
    holders = set[int]()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            status = link.stat()
            if (status.st_dev, status.st_ino) == (lock.st_dev, lock.st_ino):
                holders.add(int(link.parts[2]))
    (guard,) = (pid for pid in holders if parent_of(pid) not in holders)
    return guard


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def standing(pid: int) -> tuple[int, int]:
    """How many descriptors and children a process has."""
    return len(os.listdir(f"/proc/{pid}/fd")), len(children_of(pid))


def test_sigterm_ends_the_launcher_and_all_of_its_jobs(open_directory: Callable[[], Path]) -> None:
    directory = open_directory()
    with open_launcher(directory) as launcher:
        opened = connect(directory)
        stdout, stderr = spawn(
            opened.sock, 1, "sh", "-c", "trap '' TERM; while :; do sleep 1; done"
        )
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(timeout=20) == 0
        assert os.read(stdout, 1) == b""
        assert channel.receive(opened.sock) is None
        channel.close_all([stdout, stderr])
        opened.close()
    told = (directory / "launcher-log").read_text()
    assert told.count("INFO launcher: a service has come") == 1
    assert "INFO launcher: leaving: SIGTERM; jobs killed: 1\n" in told
    assert left_behind(directory) == []


def test_killed_launcher_takes_its_jobs_along_and_the_next_one_sweeps(
    open_directory: Callable[[], Path],
) -> None:
    directory = open_directory()
    with open_launcher(directory) as launcher:
        opened = connect(directory)
        stdout, stderr = spawn(opened.sock, 1, "sh", "-c", "setsid sleep 600 & exec sleep 600")
        launcher.kill()
        assert os.read(stdout, 1) == b""
        channel.close_all([stdout, stderr])
        opened.close()
    fewer: Extra = {"cgroup": {"enable_controllers": ["memory", "pids"]}}
    with open_launcher(directory, {**fewer, "worker": {"default_cpu_limit": 0}}):
        opened = connect(directory)
        assert opened.jobs == ()
        opened.close()
    assert left_behind(directory) == []
    assert not list(Path("/sys/fs/cgroup").rglob(instance_name(directory / "state")))


def launch(directory: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [*program("worker"), "launcher", "--config", str(directory / "worker.toml")]
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_second_launcher_of_a_state_directory_is_refused(site: Path) -> None:
    done = launch(site, "--socket", str(site / "other.sock"))
    assert done.returncode == 78
    assert "another launcher is running with it" in done.stderr
    connect(site).close()


def test_service_of_another_state_directory_is_refused_before_anything_is_made(
    site: Path,
) -> None:
    config = site / "other.toml"
    text = (site / "worker.toml").read_text()
    config.write_text(text.replace(f'"{site / "state"}"', f'"{site / "other"}"'))
    done = subprocess.run(
        [*program("worker"), "serve", "--config", str(config)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 78
    assert "another worker.state_dir" in done.stderr
    assert not (site / "other").exists()
    reconnect_when_free(site).close()


def test_socket_goes_with_its_launcher(open_directory: Callable[[], Path]) -> None:
    directory = open_directory()
    listens = directory / "launcher.sock"
    with open_launcher(directory):
        assert listens.is_socket()
    assert not listens.exists()
    with open_launcher(directory) as guard:
        os.kill(child_of(guard.pid), signal.SIGKILL)
        guard.wait(timeout=30)
        assert not listens.exists()
    with open_launcher(directory):
        listens.unlink()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
            other.bind(str(listens))
    assert listens.is_socket(), "it is another's"


def test_launcher_that_is_refused_leaves_no_socket(open_directory: Callable[[], Path]) -> None:
    directory = open_directory()
    with open_launcher(directory):
        pass
    with (directory / "worker.toml").open("a") as config:
        config.write('\n[runtimes.none]\npath = "/nosuch"\n')
    done = launch(directory)
    assert done.returncode != 0
    assert "/nosuch" in done.stderr
    assert not (directory / "launcher.sock").exists()


def test_service_without_its_launcher_says_how_to_start_it(
    open_directory: Callable[[], Path],
) -> None:
    with pytest.raises(LauncherGone, match="worker-launcher"):
        connect_launcher(str(open_directory() / "none.sock"))


def test_socket_where_others_could_put_their_own_is_refused(
    open_directory: Callable[[], Path],
) -> None:
    directory = open_directory()
    with open_launcher(directory):
        pass
    (directory / "open").mkdir()
    (directory / "open").chmod(0o777)
    done = launch(directory, "--socket", str(directory / "open" / "socket"))
    assert done.returncode == 78
    assert "others than root may write" in done.stderr
    assert left_behind(directory) == []
