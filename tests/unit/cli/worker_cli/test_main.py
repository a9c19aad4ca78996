"""The command line: one line for every failure, and its exit code.

What stands in no need of a process of its own is called in this one, by the program's own `main`: a
process takes a fifth of a second to load the program.
"""

import json
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import asyncclick as click
import pytest

from jobworker.cli.command_line.hints import HINTS
from jobworker.cli.worker import main as admin
from jobworker.cli.worker.embedded_service import program
from jobworker.cli.worker_cli import main as app
from jobworker.cli.worker_cli.main import worker_cli


class Done(NamedTuple):
    """How a program ended."""

    returncode: int
    stdout: bytes
    stderr: bytes


Program = Callable[..., Done]


@pytest.fixture
def run_main(
    monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes], tmp_path: Path
) -> Callable[[str, Callable[[], None], tuple[str | bytes, ...]], Done]:
    """Calls a program's `main` in this process, as a user without files or variables of ours."""
    for name in [name for name in os.environ if name.startswith("WORKER_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))

    def run(name: str, main: Callable[[], None], arguments: tuple[str | bytes, ...]) -> Done:
        monkeypatch.setattr(sys, "argv", [name, *map(os.fsdecode, arguments)])
        logger = logging.getLogger("jobworker")
        handlers = list(logger.handlers)
        try:
            with pytest.raises(SystemExit) as ended:
                main()
        finally:
            logger.handlers[:] = handlers
        sys.stdout.flush()
        assert isinstance(ended.value.code, int)
        return Done(ended.value.code, *capfdbinary.readouterr())

    return run


@pytest.fixture
def call(run_main: Callable[..., Done]) -> Program:
    """Calls `worker-cli` with arguments."""
    return lambda *arguments: run_main("worker-cli", app.main, arguments)


@pytest.fixture
def administer(run_main: Callable[..., Done]) -> Program:
    """Calls `worker` with arguments."""
    return lambda *arguments: run_main("worker", admin.main, arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bogus"], "No such option '--bogus'; see worker-cli --help"),
        (["list", "--name="], "'--name': it is empty; give a value, or leave it out"),
        (["run", "--cpu-cores=", "ls"], "'--cpu-cores': it is empty"),
        (["run", "--runtime", "", "ls"], "'--runtime': it is empty"),
        (["--server", "", "list"], "'--server': it is empty"),
        (["--ca=", "list"], "'--ca': it is empty"),
        (["nosuch"], "No such command 'nosuch'; see worker-cli --help"),
        (["run"], "Missing argument"),
        (["run", "--max-cpu=abc", "ls"], "'abc' is not a whole number of percent"),
        (["run", "--timeout", "12 parsecs", "ls"], "'12 parsecs' is not a duration"),
        (["run", "--env", "A", "ls"], "'A' is not NAME=VALUE"),
        (["status", "0"], "'0' is no job's id: an integer from 1 to 4611686018427387904"),
        (["status", "9" * 23], "' is no job's id: an integer from 1 to 4611686018427387904"),
        (["log", "-n", "abc", "1"], "'abc' is not a valid integer;"),
        (["run", "-l", "team=a", "-l", "team=b", "x"], "not both team=a and team=b: leave one out"),
        (["status", "1_0"], "'1_0' is no job's id"),
        (["wait"], "Missing argument"),
        (["ps"], "No such command 'ps'; write worker-cli list"),
        (["kill", "1"], "No such command 'kill'; write worker-cli stop"),
        (["cancel", "1"], "; write worker-cli stop"),
        (["inspect", "1"], "; write worker-cli status"),
        (["run", "--memory=1G", "x"], "No such option '--memory'; write --max-memory"),
        (["run", "-m", "1G", "x"], "No such option '-m'; write --max-memory"),
        (["run", "--cpus", "2", "x"], "; write --max-cpu, in percent"),
        (["stop", "-m", "1"], "No such option '-m'; see worker-cli stop --help"),
        (["top"], "No such command 'top'; write worker-cli status or worker-cli list"),
        (["run", "-it", "x"], "No such option '-i'; leave it out: a job has no terminal"),
        (["run", "--mem=1G", "x"], "No such option '--mem'; write --max-memory"),
        (["run", "--net=host", "x"], "No such option '--net'; write --network"),
        (["list", "-a"], "No such option '-a'; leave it out: ended jobs are listed too"),
        (["rm", "-f", "1"], "No such option '-f'; write --force"),
        (["stop", "-s", "KILL", "1"], "No such option '-s'; write --signal"),
        (["volume", "prune"], "; write worker-cli volume rm for each that no job has, by"),
        (["run", "-p", "8080:80", "x"], "a job listens at the host's own ports, and a server has"),
        (["run", "-p", "8080:80", "x"], "has no partitions; for limits write --max-memory"),
        (["run", "--publish=80:80", "x"], "a job listens at the host's own ports"),
        (["run", "--partition=long", "x"], "leave it out: a server has no partitions"),
        (["rmi"], "No such command 'rmi'; perhaps rm; see worker-cli --help"),
        (["list", "--labl=a"], "; perhaps --label; see worker-cli list --help"),
        (["run", "-v", "/tmp:/tmp", "x"], "directories of the host are never mounted"),
        (["list", "--status", "DONE"], "'DONE' is not one of"),
        (["list", "--limit", "0"], "0 is not in the range"),
        (["log", "1", "--tail"], "'--tail' requires an argument; see worker-cli log --help"),
        (["volume", "create", "--size"], "an argument; see worker-cli volume create --help"),
        (["log", "1", "--follow=yes"], "'--follow' does not take a value; see worker-cli log -"),
        (["--server"], "'--server' requires an argument; see worker-cli --help"),
    ],
)
def test_misuse_is_one_line_and_exit_code_2(
    arguments: list[str], words: str, call: Program
) -> None:
    done = call(*arguments)
    assert done.returncode == 2
    assert done.stdout == b""
    lines = done.stderr.decode().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("worker-cli: ")
    assert words in lines[0]


@pytest.mark.parametrize("path", HINTS)
def test_hints_are_for_words_that_mean_nothing_here(path: str) -> None:
    command: click.Command = worker_cli
    for name in path.split()[1:]:
        assert isinstance(command, click.Group)
        command = command.commands[name]
    known = {word for each in command.params for word in each.opts}
    known |= set(command.commands) if isinstance(command, click.Group) else set()
    words = " ".join(HINTS[path].values()).split()
    assert known.isdisjoint(words)
    assert len(words) == len(set(words))


@pytest.mark.parametrize("arguments", [["bogus"], ["--bogus"], ["certs", "renew"], ["demo", "x"]])
def test_misuse_of_the_administration_is_told_the_same_way(
    arguments: list[str], administer: Program
) -> None:
    done = administer(*arguments)
    assert done.returncode == 2
    assert done.stdout == b""
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("worker: ")
    assert "; see worker " in line


@pytest.mark.parametrize(
    ("name", "arguments"), [("worker-cli", []), ("worker-cli", ["volume"]), ("worker", ["certs"])]
)
def test_group_without_a_command_shows_its_help(name: str, arguments: list[str]) -> None:
    done = subprocess.run([*program(name), *arguments], capture_output=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(b"Usage: ")
    assert b"\nCommands:\n" in done.stderr


def test_group_without_a_command_is_json_where_json_is_asked_for(call: Program) -> None:
    done = call("--json", "volume")
    assert done.returncode == 2
    told = json.loads(done.stderr)["error"]
    assert (told["message"], told["remedy"]) == ("Missing command", "see worker-cli volume --help")


@pytest.mark.parametrize("name", ["worker-cli", "worker"])
@pytest.mark.parametrize("asked", ["--help", "--version", "prune --help"])
def test_help_that_cannot_be_printed_is_a_failure(name: str, asked: str) -> None:
    command = shlex.join([*program(name), *asked.split()])
    done = subprocess.run(
        ["sh", "-c", f"{command} >&-"], stderr=subprocess.PIPE, check=False, timeout=60
    )
    assert done.returncode == 83
    assert b"cannot print: standard output is closed" in done.stderr


def test_error_is_one_line_with_a_remedy_and_its_exit_code(call: Program) -> None:
    done = call("list")
    assert done.returncode == 72
    assert done.stderr.startswith(b"worker-cli: cannot use the CA certificate ")
    assert b"; copy ca-cert.pem" in done.stderr
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("arguments", [["--json", "list"], ["list", "--json"]])
def test_error_is_one_json_object_where_json_is_asked_for(
    arguments: list[str], call: Program
) -> None:
    done = call(*arguments)
    assert done.returncode == 72
    assert done.stdout == b""
    assert json.loads(done.stderr)["error"]["name"] == "credentials_unusable"


def test_misuse_is_json_too(call: Program) -> None:
    for arguments in (["status", "x"], ["log", "1", "--tail"]):
        done = call("--json", *arguments)
        assert done.returncode == 2
        assert json.loads(done.stderr)["error"]["exit_code"] == 2


def test_control_characters_in_an_error_are_made_visible(call: Program) -> None:
    done = call("--ca", "/a\x1b[2J\nb", "list")
    assert done.stderr.count(b"\n") == 1
    assert b"/a\\x1b[2J\\x0ab" in done.stderr


def test_argument_that_is_no_text_is_named_by_number(call: Program) -> None:
    done = call("run", "ls", b"a\xff")
    assert done.returncode == 65
    assert b"argument 1 is not UTF-8 text" in done.stderr


def test_dashes_after_the_command_are_the_jobs(call: Program) -> None:
    for arguments in (["run", "ls", "--help"], ["run", "--", "ls", "--help", "--bogus"]):
        # Not the help of `run`, and no misuse: it gets as far as its credentials.
        assert call(*arguments).returncode == 72


def test_values_stand_after_a_blank_or_an_equal_sign(call: Program) -> None:
    for arguments in (["--server", "h:0", "list"], ["--server=h:0", "list"]):
        done = call(*arguments)
        assert done.returncode == 78
        assert b"port '0'" in done.stderr


def test_version_and_help_are_told(call: Program) -> None:
    assert b"0." in call("--version").stdout
    assert b"--max-memory" in call("run", "--help").stdout
    for command in ("run", "log"):
        assert b"exec 2>&1" in call(command, "--help").stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    for command in ([*program("worker-cli"), "--help"], [*program("worker"), "certs", "--help"]):
        with Path("/dev/full").open("wb") as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
        assert done.returncode == 83
        assert done.stderr.count(b"\n") == 1
        assert b": cannot print: No space left on device; " in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("name", "arguments", "code"),
    [
        ("worker-cli", ["list", "--limit", "0"], 2),
        ("worker-cli", ["list", "--json"], 72),
        ("worker-cli", ["--bogus"], 2),
        ("worker", ["audit", "--bogus"], 2),
        ("worker", ["audit", "--config", "/no/such/file"], 78),
    ],
)
def test_failure_that_cannot_be_told_keeps_its_code(
    name: str, arguments: list[str], code: int, tmp_path: Path
) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*program(name), *arguments],
            env={**os.environ, "HOME": str(tmp_path)},
            stderr=full,
            check=False,
        )
    assert done.returncode == code


def test_closed_standard_output_is_an_error_of_its_own(tmp_path: Path) -> None:
    worker = shlex.join([*program("worker"), "certs", "init", "--dir", str(tmp_path / "certs")])
    done = subprocess.run(f"{worker} >&-", shell=True, capture_output=True, check=False)
    assert done.returncode == 83
    assert b"worker: cannot print: standard output is closed; " in done.stderr


@pytest.mark.parametrize("name", ["worker", "worker-cli"])
def test_program_whose_reader_left_ends_as_one_that_sigpipe_ends(name: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        command = [*program(name), "--help"]
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (141, b"")


def test_client_needs_no_bindings_of_openssl() -> None:
    code = (
        "import sys, jobworker.cli.worker_cli.main, jobworker.client.client; "
        "print([n for n in ('cryptography', 'OpenSSL', 'sqlite3', 'asyncio') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout == b"[]\n"


def test_package_loads_the_client_when_asked_for() -> None:
    code = (
        "import sys, jobworker; before = 'trio' in sys.modules; "
        "print(before, jobworker.Client.__name__, 'trio' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout == b"False Client True\n"
