"""A job from options, and faults in their words."""

import pytest

from jobworker.cli.worker_cli.request import in_options, make_spec
from jobworker.errors import InvalidParams, TooLarge
from jobworker.model.job import Limits

NONE: dict[str, int | None] = {"cpu_percent": None, "memory_bytes": None}


def test_options_become_a_request() -> None:
    spec = make_spec(
        ("ls", "--help"),
        limits={"cpu_percent": 50, "memory_bytes": 64 << 20, "io_bps": None, "processes": 0},
        timeout_seconds=1.5,
        environment={"A": "b=c"},
        workdir="/tmp",
        name="n",
    )
    assert spec.command == ("ls", "--help")
    assert spec.limits == Limits(cpu_percent=50, memory_bytes=64 << 20, processes=0)
    assert (spec.timeout_seconds, spec.environment) == (1.5, {"A": "b=c"})
    assert (spec.workdir, spec.name) == ("/tmp", "n")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("a", "b\udcff"), "argument 1 is not UTF-8 text"),
        (("a\0",), "argument 0 contains a NUL"),
        (("",), "the command is empty"),
        (("a", "x" * 131_072), "argument 1 has 131072 bytes"),
    ],
)
def test_bad_arguments_are_named_by_number(command: tuple[str, ...], words: str) -> None:
    with pytest.raises(InvalidParams) as caught:
        make_spec(command, limits=NONE)
    assert caught.value.message.startswith(f"cannot run the command: {words}")


def test_all_bad_limits_are_named_by_their_options() -> None:
    with pytest.raises(InvalidParams) as caught:
        make_spec(
            ("a",),
            limits={"cpu_percent": -1, "memory_bytes": 1 << 20, "io_bps": 1, "processes": 1 << 40},
        )
    assert caught.value.message == (
        "cannot run the command: "
        "--max-cpu: must be 0 (no limit) or from 1 to 819200, not -1; "
        "--max-memory: must be 0 (no limit) or from 4 MiB to 1024 TiB, not 1 MiB; "
        "--max-iobps: must be 0 (no limit) or from 4 KiB to 1024 TiB, not 1 B; "
        "--max-pids: must be 0 (no limit) or from 1 to 4194304, not 1099511627776"
    )


def test_bad_variables_are_named() -> None:
    with pytest.raises(InvalidParams, match="--env A is not UTF-8 text"):
        make_spec(("a",), limits=NONE, environment={"A": "\udcff"})
    with pytest.raises(InvalidParams, match="--env: '1A' is not a name"):
        make_spec(("a",), limits=NONE, environment={"1A": ""})


def test_what_the_server_says_is_told_of_options_too() -> None:
    faults = [{"path": "job.limits.cpu_percent", "problem": "900 is more than 200"}]
    said = InvalidParams("as the server has it", remedy="ask for less", data={"faults": faults})
    told = in_options(said)
    assert told.message == "cannot run the command: --max-cpu: 900 is more than 200"
    assert (told.remedy, told.data) == (said.remedy, said.data)
    other = InvalidParams("cannot subscribe: name: is empty")
    assert in_options(other) is other


def test_users_own_words_are_told_as_they_are() -> None:
    with pytest.raises(InvalidParams) as caught:
        make_spec(("a",), limits=NONE, workdir="name: x", volumes=[{"name": "a/b", "path": ""}])
    volume, workdir = caught.value.message.removeprefix("cannot run the command: ").split("; ")
    assert workdir.startswith("--workdir: ")
    assert workdir.endswith("'name: x'")
    assert volume.startswith("--volume: 'a/b' is no name")


def test_bounds_of_sizes_are_told_with_units() -> None:
    with pytest.raises(InvalidParams) as caught:
        make_spec(("a",), limits={"memory_bytes": 1 << 20, "disk_bytes": 15 << 20})
    assert caught.value.message == (
        "cannot run the command: "
        "--max-memory: must be 0 (no limit) or from 4 MiB to 1024 TiB, not 1 MiB; "
        "--max-disk: must be from 16 MiB to 16 TiB, not 15 MiB"
    )


def test_too_much_is_refused_before_it_is_sent() -> None:
    with pytest.raises(TooLarge):
        make_spec(("a", *["x" * 100_000] * 11), limits=NONE)
