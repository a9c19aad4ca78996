"""Which server and which files: the order of places, and the file's form."""

import os
from pathlib import Path

import pytest

from jobworker.cli.worker_cli.connection_options import (
    CA,
    CERTIFICATE,
    KEY,
    SERVER,
    read_settings,
    resolve,
)
from jobworker.client.address import Address
from jobworker.errors import ConfigError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config"


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")


def test_defaults_stand_where_nothing_is_said(file: Path) -> None:
    target = resolve({}, {}, file)
    assert target.address == Address("127.0.0.1", 50051)
    assert target.certificate == Path("/home/ann/.worker/client-cert.pem")
    assert target.key == Path("/home/ann/.worker/client-key.pem")
    assert target.ca == Path("/home/ann/.worker/ca-cert.pem")


def test_option_beats_environment_beats_file_beats_default(file: Path) -> None:
    file.write_text(
        "export WORKER_SERVER=file\nexport WORKER_CERT_PATH=/file\nexport WORKER_KEY_PATH=/file\n"
    )
    target = resolve(
        {SERVER: "[::1]:5"}, {SERVER: "environment", CERTIFICATE: "/environment"}, file
    )
    assert target.address == Address("::1", 5)
    assert target.certificate == Path("/environment")
    assert target.key == Path("/file")
    assert target.ca == Path("/home/ann/.worker/ca-cert.pem")


def test_empty_variables_count_as_unset(file: Path) -> None:
    assert resolve({}, {SERVER: ""}, file).address.host == "127.0.0.1"


def test_file_is_not_read_where_nothing_is_open(file: Path) -> None:
    file.write_text("(\n")
    given = {SERVER: "a", CERTIFICATE: "b", KEY: "c", CA: "d"}
    assert resolve(given, {}, file).address.host == "a"


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ('export WORKER_CA_PATH="~/ca file.pem"  # mine', "/home/ann/ca file.pem"),
        ("export WORKER_CA_PATH='~/x#y.pem'", "/home/ann/x#y.pem"),
        ("  WORKER_CA_PATH=/a=b.pem", "/a=b.pem"),
        ("export OTHER=1 WORKER_CA_PATH=/c.pem", "/c.pem"),
        ("export WORKER_CA_PATH=$HOME/c.pem", "/home/ann/c.pem"),
        ('export WORKER_CA_PATH="${HOME}/a b.pem"', "/home/ann/a b.pem"),
        ('export WORKER_CA_PATH="it\'s $HOME"', "it's /home/ann"),
        ("export WORKER_CA_PATH='$HOME/c.pem'", "$HOME/c.pem"),
        (r"export WORKER_CA_PATH=\$HOME/c.pem", "$HOME/c.pem"),
        ("D=/d\nexport WORKER_CA_PATH=$D/c.pem", "/d/c.pem"),
        ("OTHER=$(date) WORKER_CA_PATH=/c.pem", "/c.pem"),
        ("WORKER_CA_PATH=/c$ # $NOBODY", "/c$"),
    ],
)
def test_lines_are_read_as_a_shell_would(file: Path, line: str, value: str) -> None:
    file.write_text(f"# settings\n\n{line}\n")
    assert resolve({}, {}, file).ca == Path(value)


@pytest.mark.parametrize(
    "line",
    [
        *("worker", 'export A="b', "export", "export 1A=b", "A = b", "set -e", "=x"),
        *("WORKER_CA_PATH=a\0b", "WORKER_CA_PATH=~a\0b"),
    ],
)
def test_malformed_line_is_named_with_its_number(file: Path, line: str) -> None:
    file.write_text(f"export A=b\n\n{line}\n")
    with pytest.raises(ConfigError, match=r"config, line 3: ") as caught:
        read_settings(file)
    assert "export NAME=" in caught.value.remedy


@pytest.mark.parametrize("value", ["$NOBODY/x", '"${NOBODY}"', "${NOBODY}$(pwd)"])
def test_variable_that_is_not_set_is_named(file: Path, value: str) -> None:
    file.write_text(f"export WORKER_CA_PATH={value}\n")
    with pytest.raises(ConfigError, match=r"line 1: .* WORKER_CA_PATH: \$NOBODY is not set"):
        read_settings(file)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("$(pwd)/x", "a command"),
        ('"a/$(cat x)"', "a command"),
        ("`pwd`/x", "a command"),
        ("${NOBODY:-/x}", r"a form of \$\{…\} that only a shell knows"),
    ],
)
def test_what_only_a_shell_can_expand_is_not_told_as_a_variable(
    file: Path, value: str, why: str
) -> None:
    file.write_text(f"export WORKER_CA_PATH={value}\n")
    with pytest.raises(ConfigError, match=rf"the value of WORKER_CA_PATH: it contains {why}"):
        read_settings(file)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\xff\n", "it is not UTF-8 text"),
        (b"\xef\xbb\xbfA=b\n", "it begins with a byte order mark"),
    ],
)
def test_file_that_is_no_text_is_refused(file: Path, content: bytes, why: str) -> None:
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"{why}.*; convert it to UTF-8 without"):
        read_settings(file)


def test_fifo_and_device_are_refused_at_once(file: Path) -> None:
    os.mkfifo(file)
    with pytest.raises(ConfigError, match="it is not a regular file; put a text file there"):
        read_settings(file)
    file.unlink()
    file.symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="it is not a regular file; put a text file there"):
        read_settings(file)


def test_file_that_cannot_be_read_is_refused(file: Path) -> None:
    file.mkdir()
    with pytest.raises(ConfigError, match="it is a directory; put a text file there"):
        read_settings(file)


def test_bad_address_is_refused_with_its_place(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"port '0'.*\(from the environment\)"):
        resolve({}, {SERVER: "a:0"}, file)
    with pytest.raises(ConfigError, match="from its option"):
        resolve({SERVER: "a:b"}, {}, file)


@pytest.mark.parametrize(("text", "seconds"), [("", 5), ("1m", 60), ("0", 0)])
def test_patience_is_what_environment_or_file_says(file: Path, text: str, seconds: float) -> None:
    assert resolve({}, {"WORKER_PATIENCE": text}, file).start_patience_seconds == seconds
    file.write_text(f"export WORKER_PATIENCE={text}\n")
    assert resolve({}, {}, file).start_patience_seconds == seconds
    assert resolve({}, {"WORKER_PATIENCE": "7"}, file).start_patience_seconds == 7


def test_patience_that_is_no_duration_is_refused_with_its_place(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"WORKER_PATIENCE of the environment.*soon"):
        resolve({}, {"WORKER_PATIENCE": "soon"}, file)
    file.write_text("export WORKER_PATIENCE=soon\n")
    with pytest.raises(ConfigError, match=r"WORKER_PATIENCE of .*config.*soon"):
        resolve({}, {}, file)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("WORKER_SEVER", "write WORKER_SERVER"),
        ("WOKER_SERVER", "write WORKER_SERVER"),
        ("worker_server", "write WORKER_SERVER"),
        ("WORKER_CERTPATH", "write WORKER_CERT_PATH"),
        ("WORKER_TOKEN", "give one of WORKER_SERVER, WORKER_CERT_PATH"),
    ],
)
def test_misspelt_name_is_refused_with_what_was_meant(file: Path, name: str, remedy: str) -> None:
    file.write_text(f"export A=b\nexport {name}=x\n")
    with pytest.raises(ConfigError, match=f"config, line 2: {name} is not a known name") as caught:
        read_settings(file)
    assert caught.value.remedy.startswith(remedy)


def test_name_of_ones_own_is_taken_where_a_later_line_uses_it(file: Path) -> None:
    file.write_text("WORKER_HOME=/w\nexport WORKER_CA_PATH=$WORKER_HOME/ca.pem\n")
    assert resolve({}, {}, file).ca == Path("/w/ca.pem")


@pytest.mark.parametrize(
    "line", ["x" * 500_000, f"WORKER_{'X' * 500_000}=1", f"WORKER_CA_PATH=${'X' * 500_000}"]
)
def test_error_about_a_long_line_is_short(file: Path, line: str) -> None:
    file.write_text(line)
    with pytest.raises(ConfigError) as raised:
        read_settings(file)
    assert len(str(raised.value)) < 1000
