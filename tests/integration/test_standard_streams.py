"""Standard streams that take nothing or are closed: the service and its launcher go on."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from jobworker.cli.worker.embedded_service import program
from jobworker.pki.administration import init_authority
from jobworker.server.reporting.notify import ADDRESS_FIELD

from ..services import write_configuration
from .conftest import child_of, left_behind


@pytest.fixture
def site(open_directory: Callable[[], Path]) -> Iterator[Path]:
    """A directory with certificates; nothing may run from it afterwards."""
    directory = open_directory()
    init_authority(directory / "certs", [], now=datetime.now(UTC))
    write_configuration(directory, {"launcher": {"socket": str(directory / "launcher.sock")}})
    yield directory
    (directory / "state" / "scratch").mkdir(parents=True, exist_ok=True)
    assert left_behind(directory) == []


class Started:
    """A program that runs, and what it told its supervisor."""

    def __init__(self, process: "subprocess.Popen[bytes]", told: str, directory: Path) -> None:
        self.process, self.directory = process, directory
        self._told = dict(line.split("=", 1) for line in told.splitlines())

    @property
    def address(self) -> str:
        return self._told[ADDRESS_FIELD]


@contextmanager
def started(
    directory: Path, what: str, shell: str = 'exec "$@"', stderr: int = subprocess.DEVNULL
) -> Iterator[Started]:
    """`worker WHAT`, by way of a shell, ready; ended by SIGTERM."""
    notes = directory / f"notify-{what}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as plain:
        plain.bind(str(notes))
        plain.settimeout(60)
        command = [*program("worker"), what, "--config", str(directory / "worker.toml")]
        process = subprocess.Popen(
            ["sh", "-c", shell, "sh", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env={**os.environ, "NOTIFY_SOCKET": str(notes)},
        )
        try:
            yield Started(process, plain.recv(4096).decode(), directory)
        finally:
            process.terminate()
            try:
                assert process.wait(30) == 0
            finally:
                process.kill()
                process.wait()
                notes.unlink()


def run(service: Started, *arguments: str) -> str:
    certs = service.directory / "certs"
    done = subprocess.run(
        [*program("worker-cli"), *arguments],
        env={
            **os.environ,
            "WORKER_SERVER": service.address,
            "WORKER_CERT_PATH": str(certs / "admin-client-cert.pem"),
            "WORKER_KEY_PATH": str(certs / "admin-client-key.pem"),
            "WORKER_CA_PATH": str(certs / "ca-cert.pem"),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


def fill(pipe: int) -> None:
    os.set_blocking(pipe, False)
    try:
        while True:
            os.write(pipe, b"x\n")
    except BlockingIOError:
        os.set_blocking(pipe, True)


def test_service_whose_log_is_a_stopped_reader_serves_and_ends(site: Path) -> None:
    read, write = os.pipe()
    fill(write)
    try:
        with (
            started(site, "launcher", stderr=write),
            started(site, "serve", stderr=write) as service,
        ):
            for _ in range(3):
                service.process.send_signal(signal.SIGHUP)
            assert run(service, "run", "-f", "echo", "hi") == "hi\n"
            began = time.monotonic()
        assert time.monotonic() - began < 60
        os.set_blocking(read, False)
        assert os.read(read, 4).startswith(b"x\n")
    finally:
        os.close(read)
        os.close(write)


def test_start_that_fails_with_a_stopped_reader_ends(site: Path) -> None:
    write_configuration(site, {"worker": {"user": "nosuchuser"}})
    read, write = os.pipe()
    fill(write)
    for arguments in (["serve"], ["launcher", f"--socket={site}/launcher.sock"]):
        command = [*program("worker"), *arguments, "--config", str(site / "worker.toml")]
        done = subprocess.run(command, stderr=write, timeout=20, check=False)
        assert done.returncode == 78
    os.close(read)
    os.close(write)


def descriptors(pid: int) -> dict[int, str]:
    return {
        int(link.name): os.readlink(link)
        for link in Path(f"/proc/{pid}/fd").iterdir()
        if link.is_symlink()
    }


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_never_the_number_of_another_file(site: Path, closed: str) -> None:
    shell = f'exec "$@" {closed}'
    ids = Path("/run/jobworker.ids")
    before = ids.read_bytes() if ids.exists() else b""
    with started(site, "launcher", shell) as launcher:
        with started(site, "serve", shell) as service:
            assert run(service, "run", "-f", "echo", "hi") == "hi\n"
            guard = launcher.process.pid
            for pid in (guard, child_of(guard), service.process.pid):
                held = descriptors(pid)
                assert [held[number] for number in range(3)] == ["/dev/null"] * 3
        with started(site, "serve", shell):  # each end of a service is told in the launcher's log
            pass
    assert (site / "state" / "launcher.lock").read_bytes() == b""
    assert ids.read_bytes() == before


@contextmanager
def disk(directory: Path) -> Iterator[Path]:
    """A disk of its own."""
    image, place = directory / "log.img", directory / "disk"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)
        image.unlink()
        place.rmdir()


@contextmanager
def frozen(place: Path) -> Iterator[None]:
    """Where each write waits until the end of the block: fsfreeze(8)."""
    subprocess.run(["fsfreeze", "-f", place], check=True)
    try:
        yield
    finally:
        subprocess.run(["fsfreeze", "-u", place], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_service_whose_log_is_on_a_frozen_disk_serves(site: Path) -> None:
    with (
        disk(site) as place,
        (place / "log").open("ab") as log,
        # A launcher that had a word to say there, of a slow turn, would wait: see architecture.md.
        (site / "launcher-log").open("ab") as other,
        started(site, "launcher", stderr=other.fileno()),
        started(site, "serve", stderr=log.fileno()) as service,
    ):
        with frozen(place):
            for _ in range(2):
                service.process.send_signal(signal.SIGHUP)
                assert run(service, "run", "-f", "echo", "hi") == "hi\n"
        assert run(service, "run", "-f", "echo", "hi") == "hi\n"
        while (place / "log").read_text().count(": connected: ") != 3:
            time.sleep(0.01)
