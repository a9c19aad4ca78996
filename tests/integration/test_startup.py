"""`worker serve` and `worker certs` with what is wrong: one line, an exit code, nothing left."""

import os
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trio

from jobworker.cli.worker.embedded_service import EmbeddedService, program
from jobworker.pki.administration import init_authority

from ..services import open_embedded, write_configuration
from .conftest import left_behind, until


@pytest.fixture
def site(open_directory: Callable[[], Path]) -> Iterator[Path]:
    """A directory with certificates; nothing may run from it afterwards."""
    directory = open_directory()
    init_authority(directory / "certs", [], now=datetime.now(UTC))
    yield directory
    (directory / "state" / "scratch").mkdir(parents=True, exist_ok=True)
    assert left_behind(directory) == []


def serve(config: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*program("worker"), "serve", "--config", str(config)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def run_hi(service: EmbeddedService) -> "subprocess.CompletedProcess[str]":
    """A job that says hi."""
    return subprocess.run(
        [*program("worker-cli"), "run", "-f", "echo", "hi"],
        env={**os.environ, **service.environment()},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def fails_with(done: "subprocess.CompletedProcess[str]", code: int, *words: str) -> None:
    """One line on standard error that holds the words, and the exit code."""
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("worker: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in lines[0]


def test_port_in_use(site: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = write_configuration(site, {"server": {"port": port}})
        fails_with(serve(config), 73, f"127.0.0.1:{port}", "Address already in use", "server.port")


def test_address_of_another_host(site: Path) -> None:
    config = write_configuration(site, {"server": {"address": "192.0.2.1"}})
    fails_with(serve(config), 73, "192.0.2.1", "server.address")


def test_missing_configuration(site: Path) -> None:
    fails_with(serve(site / "none.toml"), 78, "none.toml", "No such file")


def test_every_bad_key_is_named_at_once(site: Path) -> None:
    config = write_configuration(
        site,
        {
            "server": {"port": 70_000},
            "worker": {"default_cpu_limit": "much", "job_timeout": "soon", "colour": 1},
            "cgroup": {"enable_controllers": ["cpu", "magic"]},
        },
    )
    fails_with(
        serve(config),
        78,
        *("worker.toml", "server.port", "worker.default_cpu_limit", "worker.job_timeout"),
        *("'colour'", "cgroup.enable_controllers"),
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["own.toml", "No such file", "sandbox.seccomp_profile"]),
        ("[[allow]", ["it is not TOML", "line 1"]),
        (
            'newest_call = 469\n[[allow]]\nwhat = "reading"\ncalls = ["raed"]\n',
            ["no rule allows", "execve"],
        ),
    ],
)
def test_profile_of_system_calls_that_cannot_be_used(
    site: Path, text: str | None, words: list[str]
) -> None:
    if text is not None:
        (site / "own.toml").write_text(text)
    # A relative path is taken from the configuration's own directory.
    config = write_configuration(site, {"sandbox": {"seccomp_profile": "own.toml"}})
    fails_with(serve(config), 78, f"cannot {'read' if text is None else 'use'}", *words)


def test_misspelt_system_call_is_told_by_its_rule(site: Path) -> None:
    profile = Path(__file__).parents[2] / "etc" / "seccomp.toml"
    (site / "own.toml").write_text(profile.read_text().replace('"readahead"', '"raedahead"'))
    config = write_configuration(site, {"sandbox": {"seccomp_profile": str(site / "own.toml")}})
    fails_with(serve(config), 78, "own.toml", '"read and write"', "'raedahead'", "[numbers]")


def test_broken_toml(site: Path) -> None:
    config = site / "worker.toml"
    config.write_text("[server\n")
    fails_with(serve(config), 78, "not TOML", "line 1")


@pytest.mark.parametrize("name", ["ca-cert.pem", "server-cert.pem", "server-key.pem", "ca-crl.pem"])
def test_missing_certificate_file(site: Path, name: str) -> None:
    (site / "certs" / name).unlink()
    config = write_configuration(site, {})
    fails_with(serve(config), 72, name, "worker certs ")


def test_key_of_another_certificate(site: Path) -> None:
    shutil.copy(site / "certs" / "admin-client-key.pem", site / "certs" / "server-key.pem")
    config = write_configuration(site, {})
    fails_with(serve(config), 72, "server-key.pem", "does not belong")


def test_state_directory_that_others_may_write(site: Path) -> None:
    (site / "state").mkdir()
    (site / "state").chmod(0o777)
    config = write_configuration(site, {})
    fails_with(serve(config), 78, "worker.state_dir", "chmod")


def test_state_directory_behind_a_closed_one(site: Path) -> None:
    (site / "closed").mkdir(mode=0o700)
    config = write_configuration(site, {"worker": {"state_dir": str(site / "closed" / "state")}})
    fails_with(serve(config), 78, "cannot reach it", f"chmod o+x {site}/closed")


def test_state_directory_that_is_closed_itself(site: Path) -> None:
    """As an earlier service left it that was started under a umask of 077."""
    (site / "state").mkdir(mode=0o700)
    config = write_configuration(site, {})
    fails_with(serve(config), 78, "cannot reach it", f"chmod o+x {site}/state")


@pytest.mark.parametrize("umask", [0o077, 0o777, 0o000])
async def test_umask_of_whoever_starts_it_is_not_the_services(site: Path, umask: int) -> None:
    shutil.rmtree(site / "certs")
    state = site / "new" / "above" / "state"
    before = os.umask(umask)
    try:
        init_authority(site / "keys" / "certs", [], now=datetime.now(UTC))
        os.umask(0o022)
        (site / "keys" / "certs").rename(site / "certs")
        config = {"worker": {"state_dir": str(state)}}
        os.umask(umask)
        async with open_embedded(site, config) as started:
            done = await trio.to_thread.run_sync(run_hi, started)
    finally:
        os.umask(before)
    assert done.stdout == "hi\n", done.stderr
    for path in (state, state.parent, state.parent.parent, site / "keys"):
        assert path.stat().st_mode & 0o777 == 0o755
    for path in (site / "certs", *(state / name for name in ("stage", "scratch", "volumes"))):
        assert path.stat().st_mode & 0o777 == 0o700


def test_state_directory_that_jobs_could_read(site: Path) -> None:
    config = write_configuration(site, {"sandbox": {"programs": ["/usr", str(site)]}})
    fails_with(serve(config), 78, "worker.state_dir", "security.server_key", "every job could read")


def test_second_service_with_the_same_state(service: EmbeddedService) -> None:
    done = serve(service.directory / "worker.toml")
    fails_with(done, 78, "another service is running with it")


def test_unknown_user(site: Path) -> None:
    config = write_configuration(site, {"worker": {"user": "nosuchuser"}})
    fails_with(serve(config), 78, "nosuchuser", "useradd")


def test_root_is_no_user_for_the_service(site: Path) -> None:
    config = write_configuration(site, {"worker": {"user": "root"}})
    fails_with(serve(config), 78, "must not be root")


def test_certs_init_writes_the_set_and_never_overwrites(open_directory: Callable[[], Path]) -> None:
    directory = open_directory() / "certs"
    command = [*program("worker"), "certs", "init", f"--dir={directory}", "--host", "a.example"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "a.example" in done.stdout
    names = {path.name for path in directory.iterdir()}
    pairs = ("ca", "server", "admin-client", "viewer-client")
    files = {f"{stem}-{kind}.pem" for stem in pairs for kind in ("cert", "key")}
    assert names == files | {"ca-crl.pem", "issued.json"}
    for path in directory.glob("*-key.pem"):
        assert path.stat().st_mode & 0o777 == 0o600
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    fails_with(again, 72, "exists already")


def test_certs_init_refuses_a_bad_host(open_directory: Callable[[], Path]) -> None:
    directory = open_directory() / "certs"
    command = [*program("worker"), "certs", "init", f"--dir={directory}", "--host", "a b"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    fails_with(done, 65, "a b")
    assert not directory.exists()


async def test_key_that_others_may_read_is_warned_of(site: Path) -> None:
    (site / "certs" / "server-key.pem").chmod(0o644)
    async with open_embedded(site) as exposed:
        await until(lambda: " listening on " in exposed.log_text())
        (warning,) = [line for line in exposed.log_text().splitlines() if "server-key.pem" in line]
    assert " WARNING " in warning
    assert "chmod" in warning


def test_service_user_has_no_way_to_the_keys(service: EmbeddedService) -> None:
    """The service gave root up, and holds the key in memory only."""
    status = Path(f"/proc/{service.process.pid}/status").read_text()
    uids = status.split("Uid:")[1].splitlines()[0].split()
    assert set(uids) != {"0"}
    assert len(set(uids)) == 1
    key = service.directory / "certs" / "server-key.pem"
    assert key.stat().st_uid == 0
    assert key.stat().st_mode & 0o077 == 0
    capabilities = status.split("CapEff:")[1].split()[0]
    assert int(capabilities, 16) == 0
    held = [os.readlink(link) for link in Path(f"/proc/{service.process.pid}/fd").iterdir()]
    assert not [path for path in held if "certs" in path]


def test_reload_is_no_end_whenever_it_is_asked_for(site: Path) -> None:
    """SIGHUP from the first moment to the last; of those before the start one reload is left."""
    config = write_configuration(site, {})
    command = [*program("worker"), "serve", "--config", str(config)]
    with (site / "log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log)
    status = Path(f"/proc/{process.pid}/status")
    try:
        while not handles(status.read_text(), signal.SIGHUP):
            time.sleep(0.002)
        process.send_signal(signal.SIGHUP)
        wait_for_text(site / "log", "listening on", process)
        wait_for_text(site / "log", "reloaded: ", process)
        process.terminate()
        while process.poll() is None:
            process.send_signal(signal.SIGHUP)
            time.sleep(0.0005)
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()


def handles(status: str, number: int) -> bool:
    caught = int(status.split("SigCgt:")[1].split(maxsplit=1)[0], 16)
    return bool(caught >> (number - 1) & 1)


def wait_for_text(log: Path, text: str, process: "subprocess.Popen[bytes]") -> str:
    for _ in range(6000):
        if text in (found := log.read_text()):
            return found
        assert process.poll() is None, found
        time.sleep(0.01)
    raise AssertionError(found)


def test_supervisor_that_cannot_be_reached_is_told_of_in_the_log(site: Path) -> None:
    """A NOTIFY_SOCKET of a supervisor that has gone."""
    config = write_configuration(site, {})
    environment = {**os.environ, "NOTIFY_SOCKET": str(site / "none")}
    with serving(site, config, env=environment) as log:
        assert "NOTIFY_SOCKET" in log.read_text()


@contextmanager
def serving(site: Path, config: Path, **more: Any) -> Iterator[Path]:
    """A service that listens, and its log; it ends by SIGTERM."""
    with (site / "log").open("wb") as log:
        process = subprocess.Popen(
            [*program("worker"), "serve", "--config", str(config)], stderr=log, **more
        )
    try:
        wait_for_text(site / "log", "listening on", process)
        yield site / "log"
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


async def test_state_directory_may_be_a_link_of_roots(site: Path) -> None:
    (site / "disk").mkdir(mode=0o755)
    (site / "state").symlink_to(site / "disk")
    async with open_embedded(site) as service:
        done = await trio.to_thread.run_sync(run_hi, service)
        assert done.stdout == "hi\n", done.stderr
    assert (site / "disk" / "service" / "history.db").exists()


@pytest.mark.parametrize("command", ["serve", "launcher", "audit"])
def test_state_directory_that_cannot_be_looked_for_is_refused_by_name(
    site: Path, command: str
) -> None:
    """Its name is too long; so is it told where a directory above it is closed to this user."""
    long, socket_path = str(site / (256 * "x")), str(site / "launcher.sock")
    sections = {"worker": {"state_dir": long}, "launcher": {"socket": socket_path}}
    config = write_configuration(site, sections)
    done = subprocess.run(
        [*program("worker"), command, "--config", str(config)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    fails_with(done, 78, long, "File name too long")


def test_state_directory_is_no_link_of_another_user_and_none_to_nowhere(site: Path) -> None:
    config = write_configuration(site, {})
    (site / "state").symlink_to(site / "disk")
    fails_with(serve(config), 78, "a link to", "does not exist")
    (site / "disk").mkdir(mode=0o755)
    os.chown(site / "state", 12345, 12345, follow_symlinks=False)
    fails_with(serve(config), 78, "a link of user 12345", "chown -h")


@pytest.mark.parametrize("name", ["lock", "launcher.lock", "service"])
def test_link_in_the_state_directory_is_told_as_one(site: Path, name: str) -> None:
    (site / "state").mkdir(mode=0o755)
    (site / "state" / name).symlink_to(site / "elsewhere")
    config = write_configuration(site, {})
    remedy = "remove " if "lock" in name else "mount --bind"
    fails_with(serve(config), 78, f"{name} in it is a link", remedy, f"state/{name}")


def test_state_directory_where_nothing_can_be_made(site: Path) -> None:
    config = write_configuration(site, {"worker": {"state_dir": "/proc"}})
    fails_with(serve(config), 78, "/proc", "name a directory on a disk")


def test_history_that_another_program_holds(site: Path) -> None:
    config = write_configuration(site, {})
    with serving(site, config):
        pass
    history = site / "state" / "service" / "history.db"
    with closing(sqlite3.connect(history, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        done = serve(config)
        assert "free space" not in done.stderr
        fails_with(done, 78, "another program holds it", "fuser")


def test_address_that_stands_for_nothing(site: Path) -> None:
    config = write_configuration(site, {"server": {"address": "no.such.host.invalid"}})
    done = serve(config)
    assert "Errno" not in done.stderr
    fails_with(done, 73, "no.such.host.invalid", "server.address")


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_launcher_socket_where_something_else_stands(site: Path, kind: str) -> None:
    path = site / "launcher.sock"
    if kind == "file":
        path.touch()
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(site / "elsewhere")
    config = write_configuration(site, {"launcher": {"socket": str(path)}})
    command = [*program("worker"), "launcher", "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    fails_with(done, 78, "a file that is no socket is there", "move it away")
    assert os.path.lexists(path)


async def test_limit_on_the_size_of_files_is_lifted(site: Path) -> None:
    """Below it (ulimit -f) each job was refused, and the disk called full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        async with open_embedded(site) as service:
            done = await trio.to_thread.run_sync(run_hi, service)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert done.stdout == "hi\n", done.stderr


def test_limit_on_the_size_of_files_that_stays_is_named(site: Path) -> None:
    """The hard limit, where even root may not raise it; the disks of jobs do not fit."""
    config = write_configuration(site, {})
    command = [*program("worker"), "serve", "--config", str(config)]
    limited = ["setpriv", "--bounding-set=-sys_resource", "prlimit", "--fsize=1000000", *command]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=60, check=False)
    assert "e2fsprogs" not in done.stderr
    fails_with(done, done.returncode, "File too large", "LimitFSIZE=")


def test_unusable_server_certificate_is_no_reason_for_a_new_ca(site: Path) -> None:
    config = write_configuration(site, {})
    certificate = site / "certs" / "server-cert.pem"
    shutil.copy(site / "certs" / "admin-client-cert.pem", certificate)
    mismatched = serve(config)
    certificate.write_text("-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----\n")
    damaged = serve(config)
    certificate.unlink()
    absent = serve(config)
    for done in (mismatched, damaged, absent):
        fails_with(done, 72, "worker certs renew server")
        assert "certs init" not in done.stderr


async def test_renewed_server_certificate_is_what_the_remedy_for_an_expired_one_makes(
    site: Path,
) -> None:
    certs = site / "certs"
    shutil.rmtree(certs)
    init_authority(certs, [], now=datetime.now(UTC) - timedelta(days=10), days=5)
    fails_with(
        await trio.to_thread.run_sync(serve, write_configuration(site, {})),
        *(72, "expired", "worker certs renew server"),
    )
    for which in ("server", "admin-client"):
        command = [*program("worker"), "certs", "renew", which, f"--dir={certs}"]
        await trio.run_process(command, capture_stdout=True)
    async with open_embedded(site) as service:
        hi = await trio.to_thread.run_sync(run_hi, service)
    assert hi.stdout == "hi\n", hi.stderr


def test_no_thread_has_an_arena_of_malloc_of_its_own(site: Path) -> None:
    # A second one keeps what is freed in it: after a flood of large jobs 4 MB stayed.
    async def arenas() -> list[str]:
        async with open_embedded(site) as service:
            assert run_hi(service).returncode == 0  # threads have worked for it
            lines = Path(f"/proc/{service.process.pid}/maps").read_text().splitlines()
        spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
        # malloc/arena.c of glibc: an arena begins at a multiple of HEAP_MAX_SIZE, 64 MiB, all of
        # which is reserved: what is not in use has no permissions.
        return [
            line
            for line, (start, end), (after, until_), rest in zip(
                lines, spans, spans[1:], lines[1:], strict=False
            )
            if start % (64 << 20) == 0 and end == after and "---p" in rest
            if until_ == start + (64 << 20)
        ]

    assert trio.run(arenas) == []
