"""`worker-cli` as a user has it: a process of its own for each command."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from jobworker.cli.worker.embedded_service import EmbeddedService, program
from jobworker.errors import NotFound

Done = subprocess.CompletedProcess[str]


class Cli:
    """Runs worker-cli against the service."""

    def __init__(self, service: EmbeddedService) -> None:
        self.service = service
        self.home = service.directory

    def __call__(
        self, *arguments: str, role: str = "admin", drop: str = "", **variables: str
    ) -> Done:
        """Run a command to its end; `drop` names a variable to leave out."""
        return subprocess.run(
            [*program("worker-cli"), *arguments],
            env=self.environment(role, drop) | variables,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def environment(self, role: str = "admin", drop: str = "") -> dict[str, str]:
        names = self.service.environment(role)
        names.pop(drop, None)
        kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
        return {**kept, "HOME": str(self.home), "LANG": "C.UTF-8", **names}


@pytest.fixture
def cli(service: EmbeddedService) -> Cli:
    return Cli(service)


def fails(done: Done, code: int, *words: str) -> None:
    """One line on standard error that holds the words, nothing on standard output."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("worker-cli: ")
    for word in words:
        assert word in lines[0]


def test_run_prints_the_form_that_scripts_know(cli: Cli) -> None:
    done = cli("run", "echo", "two words")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "Job started:"
    fields = dict(line.split(": ", 1) for line in lines[1:])
    assert list(fields) == ["ID", "Command", "Status", "StartTime", "Network"]
    assert fields["ID"].isdigit()
    assert fields["Command"] == "echo 'two words'"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", fields["StartTime"])
    assert fields["Network"].startswith("host")


def test_quiet_prints_the_id_only(cli: Cli) -> None:
    done = cli("run", "-q", "true")
    assert re.fullmatch(r"\d+\n", done.stdout)
    waited = cli("wait", done.stdout.strip())
    assert waited.returncode == 0


def test_follow_keeps_streams_apart_and_exits_with_the_jobs_code(cli: Cli) -> None:
    done = cli("run", "--follow", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.stdout, done.returncode) == ("out\n", 7)
    assert done.stderr.startswith("err\n")


def test_ps_shows_one_process(cli: Cli) -> None:
    done = cli("run", "-f", "ps", "aux")
    assert [line.split()[1] for line in done.stdout.splitlines()[1:]] == ["1"]


@pytest.mark.parametrize("flag", [["--help"], ["-n", "-f", "--json"], ["--", "x"]])
def test_everything_after_the_command_is_the_jobs(cli: Cli, flag: list[str]) -> None:
    done = cli("run", "-f", "echo", *flag)
    expected = subprocess.run(["echo", *flag], capture_output=True, text=True, check=True)
    assert done.stdout == expected.stdout


@pytest.mark.parametrize(
    ("options", "script", "code", "says"),
    [
        (["--timeout=300ms"], "exec sleep 60", 124, "time"),
        (["--max-memory=64"], "python3 -c 'x=b\"x\"*200_000_000'; sleep 9", 137, "memory"),
        ([], "exec python3 -c 'import os; os.abort()'", 139, "signal"),
        (["--max-memory", "64", "--max-cpu=50", "--max-iobps", "1000000"], "exit 3", 3, ""),
    ],
)
def test_follow_says_how_it_ended(
    cli: Cli, options: list[str], script: str, code: int, says: str
) -> None:
    done = cli("run", "-f", *options, "bash", "-c", script)
    assert done.returncode == code, done.stderr
    assert says in done.stderr


def test_arguments_are_utf8_in_a_locale_that_knows_none(cli: Cli) -> None:
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    given = ("--name=é", "--label=a=ü", "--env=A=ß", "--secret-env=B")
    done = cli("run", "-f", *given, "sh", "-c", "printf 'ö %s %s' $A $B", B="ä", **locale)
    assert (done.stdout, done.stderr) == ("ö ß ä", "")
    found = cli("list", "--json", "--name=é", "--label=a=ü", **locale)
    assert len(json.loads(found.stdout)) == 1
    assert cli("volume", "create", "--size=16", "of-locale").returncode == 0
    done = cli("run", "-f", "--volume=of-locale:/srv/ü", "ls", "/srv", **locale)
    assert (done.stdout, done.stderr) == ("ü\n", "")
    assert cli("volume", "rm", "of-locale").returncode == 0
    for refused in (["run", "--runtime=ü", "x"], ["volume", "create", "--size=16", "ü"]):
        assert "'ü' is no name" in cli(*refused, **locale).stderr


def test_bytes_that_are_no_text_are_refused_with_a_remedy(cli: Cli) -> None:
    refused = cli("run", "echo", "\udcff")
    assert "argument 1 is not UTF-8 text; convert it to UTF-8" in refused.stderr


def test_status_of_several_jobs_goes_on_where_one_is_unknown(cli: Cli) -> None:
    first, last = (cli("run", "-q", "true").stdout.strip() for _ in range(2))
    done = cli("status", first, "999999", last)
    assert done.returncode == 66
    assert [part.splitlines()[0] for part in done.stdout.split("\n\n") if part.strip()] == [
        f"ID: {first}",
        f"ID: {last}",
    ]
    assert done.stderr.startswith("worker-cli: cannot find job 999999")
    told = cli("status", "--json", first, last).stdout.splitlines()
    assert [str(json.loads(line)["id"]) for line in told] == [first, last]


def test_status_tells_limits_and_usage(cli: Cli) -> None:
    job = cli("run", "-q", "--max-cpu=50", "--max-memory=64", "sleep", "60").stdout.strip()
    done = cli("status", job)
    assert re.search(r"^Status: RUNNING", done.stdout, re.M)
    assert re.search(r"^CPU: .*50", done.stdout, re.M)
    assert re.search(r"^Memory: .*64", done.stdout, re.M)
    stopped = cli("stop", job)
    assert stopped.returncode == 0, stopped.stderr
    assert "STOPPED" in cli("status", job).stdout
    body = json.loads(cli("--json", "status", job).stdout)
    assert (body["id"], body["state"]) == (int(job), "STOPPED")


def test_log_replays_exact_bytes(cli: Cli) -> None:
    job = cli("run", "-q", "sh", "-c", "printf 'a\\0b\\377'; echo e >&2").stdout.strip()
    cli("wait", job)
    for arguments in (["log", job], ["log", "-f", job]):
        done = subprocess.run(
            [*program("worker-cli"), *arguments],
            env=cli.environment(),
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert (done.stdout, done.stderr, done.returncode) == (b"a\0b\xff", b"e\n", 0)


def test_list_shows_states_and_escapes_what_jobs_are_called(cli: Cli) -> None:
    cli("run", "-f", "echo", "\x1b[31mred\nnew line")
    listed = cli("list", "--limit", "1").stdout
    assert "COMPLETED" in listed
    assert "\x1b" not in listed
    assert len(listed.splitlines()) == 2


def test_interrupted_follow_detaches(cli: Cli) -> None:
    with subprocess.Popen(
        [*program("worker-cli"), "run", "-f", "sh", "-c", "echo up; exec sleep 60"],
        env=cli.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGINT)
        told = process.stderr.read()
        assert process.wait(timeout=20) == 130
    job = re.search(r"job (\d+)", told)
    assert job, told
    assert "RUNNING" in cli("status", job[1]).stdout
    cli("stop", job[1])


def test_interrupted_stop_says_that_the_server_goes_on(cli: Cli) -> None:
    script = "trap 'echo asked' TERM; echo up; while :; do sleep 0.1; done"
    number = cli("run", "-q", "sh", "-c", script).stdout.strip()
    environment = cli.environment()
    with subprocess.Popen(
        [*program("worker-cli"), "log", "-f", number], env=environment, stdout=subprocess.PIPE
    ) as log:
        assert log.stdout is not None
        assert log.stdout.readline() == b"up\n"
        with subprocess.Popen(
            [*program("worker-cli"), "stop", "--grace=1s", number],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        ) as stop:
            assert stop.stderr is not None
            assert log.stdout.readline() == b"asked\n"
            stop.send_signal(signal.SIGINT)
            told = stop.stderr.read()
        assert stop.returncode == 130
        assert f"the server goes on with the stop: worker-cli wait {number}" in told
        log.stdout.read()  # to the job's end
    assert "STOPPED" in cli("status", number).stdout


def test_reader_that_leaves_ends_it_quietly(cli: Cli) -> None:
    with subprocess.Popen(
        [*program("worker-cli"), "run", "-f", "sh", "-c", "yes | head -c 3000000"],
        env=cli.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=30) != 0
        assert "Traceback" not in process.stderr.read()


# --- bad input: one line that says what, why and the remedy, and an exit code of its own ------


def test_unknown_command(cli: Cli) -> None:
    fails(cli("frobnicate"), 2, "frobnicate")


def test_missing_program(cli: Cli) -> None:
    fails(cli("run", "nosuchprogram"), 127, "nosuchprogram", "no such program", "spelling")


def test_program_without_x_bit(cli: Cli) -> None:
    fails(cli("run", "/etc/passwd"), 126, "/etc/passwd", "Permission denied", "executable")


@pytest.mark.parametrize("arguments", [["run"], ["run", "--follow"]])
def test_no_command_at_all(cli: Cli, arguments: list[str]) -> None:
    fails(cli(*arguments), 2, "COMMAND")


def test_empty_command(cli: Cli) -> None:
    fails(cli("run", ""), 65, "command", "empty")


def test_two_megabytes_of_arguments(cli: Cli) -> None:
    done = cli("run", "echo", *["x" * 100_000] * 15)
    fails(done, 79, "1048576", "file")


@pytest.mark.parametrize(
    ("option", "code"),
    [
        ("--max-cpu=-1", 65),
        ("--max-cpu=99999999", 65),
        ("--max-memory=-64", 2),
        ("--max-memory=1", 65),
        ("--max-memory=999999999", 65),
        ("--max-iobps=1", 65),
        ("--max-cpu=abc", 2),
        ("--timeout=-5", 2),
        ("--timeout=soon", 2),
        ("--env=NOVALUE", 2),
        ("--workdir=relative", 65),
    ],
)
def test_absurd_option(cli: Cli, option: str, code: int) -> None:
    fails(cli("run", option, "true"), code, option.split("=", maxsplit=1)[0])


def test_server_names_the_option_and_its_unit(cli: Cli) -> None:
    done = cli("run", "--max-memory=999999999", "true")
    fails(
        done, 65, "command: --max-memory: 999999999 MiB is more than ", " MiB, all of this host's"
    )


@pytest.mark.parametrize("command", ["status", "stop", "wait", "log"])
def test_unknown_job(cli: Cli, command: str) -> None:
    fails(cli(command, "999999"), 66, "999999", "no such job", "worker-cli list")


@pytest.mark.parametrize("command", ["status", "stop", "wait", "log"])
def test_job_that_is_no_number(cli: Cli, command: str) -> None:
    fails(cli(command, "seven"), 2, "seven")


def test_viewer_may_not_run(cli: Cli) -> None:
    fails(cli("run", "true", role="viewer"), 77, "viewer", "admin")


def test_server_not_running(cli: Cli) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    done = cli("list", WORKER_SERVER=f"127.0.0.1:{port}")
    fails(done, 69, f"127.0.0.1:{port}", "refused", "worker serve")


def test_server_that_never_answers(cli: Cli) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        done = cli("list", WORKER_SERVER=f"127.0.0.1:{silent.getsockname()[1]}")
    fails(done, 69, "127.0.0.1")


def test_unknown_host(cli: Cli) -> None:
    fails(cli("list", WORKER_SERVER="no.such.host.invalid:50051"), 68, "no.such.host.invalid")


def test_certificate_of_another_authority(cli: Cli, open_directory: Callable[[], Path]) -> None:
    directory = open_directory() / "other"
    subprocess.run(
        [*program("worker"), "certs", "init", "--dir", str(directory)],
        check=True,
        capture_output=True,
    )
    foreign = {
        "WORKER_CERT_PATH": str(directory / "admin-client-cert.pem"),
        "WORKER_KEY_PATH": str(directory / "admin-client-key.pem"),
    }
    fails(cli("list", **foreign), 67, "not from the server's CA")
    other_ca = {"WORKER_CA_PATH": str(directory / "ca-cert.pem")}
    fails(cli("list", **other_ca), 74, "CA")


def test_server_certificate_as_a_clients(cli: Cli) -> None:
    certs = cli.service.directory / "certs"
    wrong = {
        "WORKER_CERT_PATH": str(certs / "server-cert.pem"),
        "WORKER_KEY_PATH": str(certs / "server-key.pem"),
    }
    fails(cli("list", **wrong), 67, "not made for clients")


def test_server_under_another_name(cli: Cli) -> None:
    port = cli.service.address.rsplit(":", 1)[1]
    # 127.0.0.2 reaches a service at 127.0.0.1 only where it listens on all; so dial by a name.
    done = cli("list", WORKER_SERVER=f"ip6-localhost:{port}")
    assert done.returncode in (68, 69, 74)
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("variable", ["WORKER_CERT_PATH", "WORKER_KEY_PATH", "WORKER_CA_PATH"])
def test_missing_credential_file(cli: Cli, variable: str) -> None:
    fails(cli("list", **{variable: "/no/such/file.pem"}), 72, "/no/such/file.pem")
    fails(cli("list", drop=variable), 72, ".worker/")


def test_key_that_is_no_key(cli: Cli, open_directory: Callable[[], Path]) -> None:
    odd = open_directory() / "odd.pem"
    odd.write_text("not a key\n")
    fails(cli("list", WORKER_KEY_PATH=str(odd)), 72, str(odd))


def test_malformed_configuration_file(cli: Cli, open_directory: Callable[[], Path]) -> None:
    home = open_directory()
    (home / ".worker").mkdir()
    (home / ".worker" / "config").write_text('export WORKER_SERVER="127.0.0.1:1"\nnonsense here\n')
    fails(cli("list", drop="WORKER_SERVER", HOME=str(home)), 78, "line 2")


def test_order_of_option_environment_file_default(
    cli: Cli, open_directory: Callable[[], Path]
) -> None:
    home = open_directory()
    (home / ".worker").mkdir()
    config = home / ".worker" / "config"
    config.write_text('# mine\nexport WORKER_SERVER="127.0.0.1:1"\n')
    from_file = cli("list", drop="WORKER_SERVER", HOME=str(home))
    assert "127.0.0.1:1:" in from_file.stderr
    from_environment = cli("list", HOME=str(home), WORKER_SERVER="127.0.0.1:2")
    assert "127.0.0.1:2:" in from_environment.stderr
    from_option = cli("--server", cli.service.address, "list", WORKER_SERVER="127.0.0.1:2")
    assert from_option.returncode == 0, from_option.stderr


def test_errors_as_json(cli: Cli) -> None:
    done = cli("--json", "status", "999999")
    assert done.returncode == 66
    assert json.loads(done.stderr)["error"]["name"] == "not_found"


def test_volume_from_the_command_line(cli: Cli) -> None:
    assert cli("volume", "create", "--size=16", "of-cli").returncode == 0
    fails(cli("volume", "create", "--size=16", "of-cli"), 65, "of-cli: it exists")
    fails(cli("volume", "create", "--size=1", "tiny"), 65, "from 16 MiB to 16 TiB, not 1 MiB")
    write = cli("run", "-f", "--volume=of-cli:/srv/x", "sh", "-c", "echo kept > /srv/x/file")
    assert write.returncode == 0, write.stderr
    read = cli("run", "-f", "--volume", "of-cli", "--max-disk=20", "cat", "/volumes/of-cli/file")
    assert read.stdout == "kept\n", read.stderr
    listed = cli("volume", "list").stdout.splitlines()
    assert listed[0].split() == ["NAME", "SIZE", "ON", "DISK", "JOBS", "KIND"]
    assert listed[1].split()[:3] == ["of-cli", "16", "MiB"]
    assert cli("volume", "rm", "of-cli").returncode == 0
    gone = cli("run", "--volume=of-cli", "true")
    assert "there is no such volume" in gone.stderr
    assert gone.returncode == NotFound.exit_code
    fails(cli("run", "--volume=of-cli:/proc", "true"), 65, "--volume", "/proc")
    fails(cli("run", "--max-disk=1", "true"), 65, "--max-disk")
    fails(cli("run", "--runtime=nosuch", "true"), 65, "--runtime", "nosuch")


def test_volume_is_made_and_removed_in_json(cli: Cli) -> None:
    made = cli("volume", "create", "--json", "--size=16", "of-json")
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout) == {"name": "of-json", "size_bytes": 16 << 20, "thin": False}
    assert json.loads(cli("volume", "rm", "--json", "of-json").stdout) == {"name": "of-json"}
    gone = cli("volume", "rm", "of-json", "--json")
    assert json.loads(gone.stderr)["error"]["exit_code"] == gone.returncode == 66


def test_volumes_are_removed_though_one_cannot_be(cli: Cli) -> None:
    for name in ("first", "last"):
        assert cli("volume", "create", "--size=16", "--thin", name).returncode == 0
    fails(cli("volume", "rm", "first", "nosuch", "last"), 66, "no such volume")
    listed = cli("volume", "list").stdout
    assert "first" not in listed
    assert "last" not in listed


@pytest.mark.parametrize("command", ["wait", "stop", "status", "log", "list"])
def test_output_that_is_refused_is_an_error_of_its_own(cli: Cli, command: str) -> None:
    job = cli("run", "-q", "echo", "hello").stdout.strip()
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*program("worker-cli"), command, *([] if command == "list" else [job])],
            env=cli.environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    assert done.returncode == 83
    assert done.stderr.count(b"\n") == 1
    assert b"worker-cli: cannot print: No space left on device; " in done.stderr


def test_closed_standard_output_is_told(cli: Cli) -> None:
    def code(*arguments: str) -> int:
        command = f"{shlex.join([*program('worker-cli'), *arguments])} >&-"
        return subprocess.run(command, shell=True, env=cli.environment(), check=False).returncode

    assert code("run", "-q", "true") == 83
    assert code("run", "-f", "echo", "x") == 83
    assert code("run", "-f", "true") == 0


def test_refused_standard_error_is_told_of_a_jobs_bytes_alone(cli: Cli) -> None:
    with Path("/dev/full").open("wb") as full:

        def code(*arguments: str) -> int:
            command = [*program("worker-cli"), *arguments]
            environment = cli.environment()
            return subprocess.run(command, env=environment, stderr=full, check=False).returncode

        assert code("run", "-f", "sh", "-c", "echo e >&2; exit 3") == 83
        assert code("run", "-f", "--timeout=50ms", "sleep", "60") == 124
        assert code("status", "999999") == 66


def test_key_that_others_can_read_is_told(cli: Cli, tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    key.write_bytes(Path(cli.environment()["WORKER_KEY_PATH"]).read_bytes())
    key.chmod(0o644)
    done = cli("whoami", WORKER_KEY_PATH=str(key))
    assert done.returncode == 0
    assert f"worker-cli: the key {key} is open to other users" in done.stderr
    assert f"chmod 600 {key}" in done.stderr
