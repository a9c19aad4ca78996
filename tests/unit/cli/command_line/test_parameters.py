"""Values on the command line: what they come to, and what is a usage error."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import asyncclick as click
import pytest

from jobworker.cli.command_line.parameters import (
    Label,
    LabelFilter,
    Megabytes,
    Moment,
    NonEmptyText,
    Percent,
    Size,
    Text,
    User,
    Variable,
    VariableFile,
    VolumePlace,
)
from jobworker.cli.worker.main import worker
from jobworker.cli.worker_cli.main import worker_cli


def commands_below(group: click.Group) -> Iterator[click.Command]:
    """All commands of a program that are no group."""
    for command in group.commands.values():
        if isinstance(command, click.Group):
            yield from commands_below(command)
        else:
            yield command


def test_all_commands_of_the_client_take_json() -> None:
    without = [
        command.name
        for command in commands_below(worker_cli)
        if not any("--json" in option.opts for option in command.params)
    ]
    assert without == []


def refusal(kind: click.ParamType[object], value: str) -> str:
    with pytest.raises(click.BadParameter) as caught:
        kind.convert(value, None, None)
    return caught.value.message


@pytest.mark.parametrize(
    ("text", "user"), [("0", (0, None)), ("1000", (1000, None)), ("1:65535", (1, 65_535))]
)
def test_user_is_numbers(text: str, user: tuple[int, int | None]) -> None:
    assert User().convert(text, None, None) == user


@pytest.mark.parametrize("text", ["", "root", "-1", "1:", ":1", "1:2:3", " 1", "1.0", "٣"])
def test_user_of_another_form_is_refused(text: str) -> None:
    assert "is not UID or UID:GID" in refusal(User(), text)
    assert "beyond 65535" in refusal(User(), "65536")
    assert "beyond 65535" in refusal(User(), "1:999999999")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        *(("64", 64 << 20), ("0", 0), ("64M", 64 << 20), ("1.5GiB", 3 << 29), ("500K", 500 << 10)),
        *(("1.5", 3 << 19), (" 64", 64 << 20), ("0" * 13 + "1", 1 << 20), ("5000000B", 5_000_000)),
        *(("64Mi", 64 << 20), ("1.5gi", 3 << 29), ("500Ki", 500 << 10), ("1Ti", 1 << 40)),
    ],
)
def test_size_without_a_unit_is_of_megabytes(text: str, count: int) -> None:
    assert Megabytes().convert(text, None, None) == count


@pytest.mark.parametrize("text", ["", "-1", "64 parsecs", "1e3", "64iB"])
def test_size_of_another_form_is_refused_with_the_unit(text: str) -> None:
    assert "such as 500K, 64M or 2G; a number alone is MB" in refusal(Megabytes(), text)
    assert "such as 500K, 64M or 2G; a number alone is bytes" in refusal(Size(), text)


@pytest.mark.parametrize("text", ["2000T", "1000000000000", "9" * 13, "9" * 400])
def test_size_that_is_too_large_is_refused_as_such(text: str) -> None:
    assert "is more than 1024T; a number alone is MB" in refusal(Megabytes(), text)


def test_percent_may_have_its_sign() -> None:
    assert [Percent().convert(text, None, None) for text in ("50", "200%", "0")] == [50, 200, 0]
    for text in ("", "50 %%", "1.5", "half", "1_0", "500m"):
        assert "is not a whole number of percent; half a core is 50" in refusal(Percent(), text)


def test_every_size_says_its_unit_in_the_help() -> None:
    told = {
        option.name: option.help
        for command in commands_below(worker_cli)
        for option in command.params
        if isinstance(option, click.Option) and isinstance(option.type, Size | Megabytes)
    }
    assert set(told) == {"max_memory", "max_disk", "max_iobps", "max_output", "max_size", "size"}
    assert [name for name, text in told.items() if "a number alone is" not in (text or "")] == []


def test_no_text_of_an_option_is_taken_for_nothing() -> None:
    """Any may be a variable that a script has not set."""
    lax = [
        f"{command.name} {option.name}"
        for command in [*commands_below(worker_cli), worker.commands["audit"]]
        for option in command.params
        if isinstance(option, click.Option) and not option.is_flag
        if type(option.type) in (type(click.STRING), Text)
    ]
    assert lax == []
    assert "it is empty; give a value, or leave it out" in refusal(NonEmptyText(), "")


def test_label_is_a_name_and_a_value() -> None:
    assert Label().convert("team=a=b", None, None) == ("team", "a=b")
    assert Label().convert("team", None, None) == ("team", "")
    assert "is not a name for a label" in refusal(Label(), "=x")


def test_label_that_is_sought_has_a_value() -> None:
    assert LabelFilter().convert("team=", None, None) == ("team", "")
    assert "'team' is not NAME=VALUE" in refusal(LabelFilter(), "team")
    (option,) = (each for each in worker_cli.commands["list"].params if each.name == "labels")
    assert isinstance(option.type, LabelFilter)


def test_labels_that_no_job_has_together_are_refused() -> None:
    """And not answered by the jobs that have the last of them."""
    (option,) = (each for each in worker_cli.commands["list"].params if each.name == "labels")
    assert option.callback is not None
    context = click.Context(worker_cli.commands["list"])
    pairs = (("team", "a"), ("x", ""), ("team", "a"))
    assert option.callback(context, option, pairs) == {"team": "a", "x": ""}
    with pytest.raises(click.BadParameter, match="no job has both team=a and team=b"):
        option.callback(context, option, (("team", "a"), ("team", "b")))


def test_place_of_a_volume_says_nothing_of_how_it_is_mounted() -> None:
    assert VolumePlace().convert("v:/srv/x", None, None) == {"name": "v", "path": "/srv/x"}
    assert "there is no read-only mount" in refusal(VolumePlace(), "v:/srv/x:ro")


def test_secret_comes_from_here_where_no_value_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "hunter2")
    kind = Variable(from_environment=True)
    assert kind.convert("TOKEN", None, None) == ("TOKEN", "hunter2")
    assert kind.convert("TOKEN=other", None, None) == ("TOKEN", "other")
    assert kind.convert("TOKEN=", None, None) == ("TOKEN", "")
    monkeypatch.delenv("TOKEN")
    assert "'TOKEN' is not set here" in refusal(kind, "TOKEN")
    assert "is not NAME=VALUE" in refusal(Variable(), "TOKEN")


def test_file_of_variables_is_read_line_by_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FROM_HERE", "yes")
    monkeypatch.delenv("NOT_HERE", raising=False)
    file = tmp_path / "env"
    file.write_bytes(
        b'# a comment\n\n  A=1\nB="quoted" # kept\r\nC=a=b\nEMPTY=\nFROM_HERE\nNOT_HERE\nA=2\n'
    )
    assert VariableFile().convert(str(file), None, None) == (
        ("A", "1"),
        ("B", '"quoted" # kept'),
        ("C", "a=b"),
        ("EMPTY", ""),
        ("FROM_HERE", "yes"),
        ("A", "2"),
    )


def test_file_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    assert "No such file" in refusal(VariableFile(), str(tmp_path / "missing"))
    assert "No such file" in refusal(VariableFile(), "~nosuchuser/x")
    assert "Is a directory" in refusal(VariableFile(), str(tmp_path))
    (tmp_path / "binary").write_bytes(b"A=\xff")
    assert "not UTF-8" in refusal(VariableFile(), str(tmp_path / "binary"))
    (tmp_path / "marked").write_bytes(b"\xef\xbb\xbfA=1")
    assert "byte order mark" in refusal(VariableFile(), str(tmp_path / "marked"))
    assert "larger than" in refusal(VariableFile(), "/dev/zero")
    (tmp_path / "nameless").write_text("A=1\n=x\n")
    assert "line 2 of" in refusal(VariableFile(), str(tmp_path / "nameless"))


def test_moment_is_local_time_where_it_names_no_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "XXX-3")  # three hours east
    time.tzset()
    try:
        for text, hour in (("2026-01-31T12:00", 9), ("2026-01-31T12:00Z", 12)):
            told = datetime(2026, 1, 31, hour, tzinfo=UTC)
            assert Moment().convert(text, None, None) == told
        assert Moment().convert("1h", None, None) == timedelta(hours=1)
    finally:
        monkeypatch.undo()
        time.tzset()


def test_every_since_takes_moments_by_the_same_rule() -> None:
    found = [
        option.type
        for program in (worker, worker_cli)
        for command in program.commands.values()
        for option in command.params
        if option.name == "since"
    ]
    assert [type(kind) for kind in found] == [Moment, Moment]
