"""Requests to the launcher: a hostile service gets nothing past the parser."""

from collections.abc import Mapping

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jobworker.errors import ProtocolError
from jobworker.model.job import MAX_VARIABLES
from jobworker.sandbox.cgroup.hierarchy import ScopeLimits
from jobworker.sandbox.protocol import requests as r
from jobworker.sandbox.protocol.end_requests import CAUSES, EndRequest
from jobworker.sandbox.protocol.operations import parse
from jobworker.sandbox.start.plan import Order
from jobworker.storage import (
    MAX_DISK_BYTES,
    MIN_DISK_BYTES,
    MIN_MEMORY_BYTES,
    name_fault,
    place_fault,
)

from ...strategies import any_text, examples, plain_values

SPAWN: dict[str, object] = {
    "id": 7,
    "op": "spawn",
    "job": 3,
    "arguments": ["sh", "-c", ""],
    "environment": {"A": "b", "EMPTY": ""},
    "hostname": "job-3",
    "workdir": "",
    "network": "host",
    "uid": 0,
    "gid": 0,
    "init": False,
    "cpu_percent": 100,
    "memory_bytes": 4 << 20,
    "io_bps": 0,
    "disk_bytes": 0,
    "runtime": "",
    "volumes": [],
    "pids": 5,
    "cores": "",
}


def refused(message: Mapping[str, object]) -> str:
    with pytest.raises(ProtocolError) as caught:
        parse(message)
    return caught.value.message


def spawn(**fields: object) -> r.Spawn:
    number, request = parse({**SPAWN, **fields})
    assert number == 7
    assert isinstance(request, r.Spawn)
    return request


def test_spawn_is_taken_as_it_stands() -> None:
    environment = {"A": "b", "EMPTY": ""}
    order = Order("job-3", ("sh", "-c", ""), environment, "")
    assert spawn() == r.Spawn(3, order, ScopeLimits(100, 4 << 20, 0, 5))
    assert spawn(workdir="/tmp").order.workdir == "/tmp"


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ("signal", r.Signal(3, 15)),
        ("kill", r.Kill(3)),
        ("give_up", r.GiveUpStart(3)),
        ("remove", r.Remove(3)),
        ("usage", r.UsageOf(3)),
    ],
)
def test_other_operations_name_a_job(operation: str, expected: r.Request) -> None:
    fields = {"signal": 15} if operation == "signal" else {}
    assert parse({"id": 0, "op": operation, "job": 3, **fields}) == (0, expected)


@pytest.mark.parametrize("operation", ["signal", "kill"])
def test_ask_for_an_end_is_checked(operation: str) -> None:
    asked = {"id": 0, "op": operation, "job": 3, "cause": "timeout", "kill_in_ms": 5000}
    asked |= {"signal": 15} if operation == "signal" else {}
    _, request = parse(asked)
    assert isinstance(request, r.Signal | r.Kill)
    assert request.ask == EndRequest("timeout", 5000)
    assert "cause is none of output, stop, timeout" in refused({**asked, "cause": "mine"})
    for value in (-1, 1.5, None, True):
        assert "kill_in_ms is no integer" in refused({**asked, "kill_in_ms": value})
    del asked["kill_in_ms"]
    assert "kill_in_ms is no integer" in refused(asked)


def test_plan_is_asked_like_a_start_and_names_no_job() -> None:
    number, request = parse({**SPAWN, "op": "plan", "job": None})
    assert (number, request) == (7, r.PlanOf(spawn().order, spawn().limits))
    assert "arguments" in refused({**SPAWN, "op": "plan", "arguments": []})


@pytest.mark.parametrize("operation", [None, "", "SPAWN", "exec", "spawn ", 1, ["spawn"], {}])
def test_operation_outside_the_closed_set_is_refused(operation: object) -> None:
    assert "op is none" in refused({**SPAWN, "op": operation})


@pytest.mark.parametrize("key", sorted(SPAWN))
def test_every_field_is_needed(key: str) -> None:
    message = {name: value for name, value in SPAWN.items() if name != key}
    refused(message)


NUMBERS = ("id", "job", "cpu_percent", "memory_bytes", "io_bps", "pids")


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("value", [True, False, -1, 1.0, "1", None, [1], r.MAX_NUMBER + 1, 1 << 80])
def test_number_is_an_integer_within_its_bounds(key: str, value: object) -> None:
    assert f"{key} is no integer" in refused({**SPAWN, key: value})


def test_bounds_of_numbers_are_taken() -> None:
    parse({**SPAWN, **dict.fromkeys(NUMBERS, r.MAX_NUMBER)})
    parse({**SPAWN, **dict.fromkeys(NUMBERS, 0), "job": 1})
    assert "job is no integer from 1" in refused({**SPAWN, "job": 0})


@pytest.mark.parametrize("size", [1, MIN_MEMORY_BYTES - 1])
def test_memory_limit_below_what_a_new_job_has_is_refused(size: int) -> None:
    assert "memory_bytes is too small for a job" in refused({**SPAWN, "memory_bytes": size})
    assert spawn(memory_bytes=MIN_MEMORY_BYTES).limits.memory_bytes == MIN_MEMORY_BYTES


@pytest.mark.parametrize("key", ["uid", "gid"])
@pytest.mark.parametrize("value", [-1, 65_536, True, None, "0"])
def test_id_beyond_the_jobs_range_is_refused(key: str, value: object) -> None:
    assert f"{key} is no integer from 0 to 65535" in refused({**SPAWN, key: value})


@pytest.mark.parametrize(
    "cores", [None, 0, "a", "-1", "0-", "1,", "0 1", "12345", "0-3\n", "٣", ",".join(["1"] * 600)]
)
def test_cores_that_are_no_list_are_refused(cores: object) -> None:
    assert "cores is no" in refused({**SPAWN, "cores": cores})
    assert spawn(cores="0-3,5").limits.cores == "0-3,5"


@pytest.mark.parametrize("init", [None, 0, 1, "true", []])
def test_init_is_true_or_false(init: object) -> None:
    assert "init is neither" in refused({**SPAWN, "init": init})
    assert spawn(init=True).order.init is True


@pytest.mark.parametrize("network", ["", "HOST", "bridge", "none ", None, ["none"]])
def test_network_outside_the_closed_set_is_refused(network: object) -> None:
    assert "network is n" in refused({**SPAWN, "network": network})


@pytest.mark.parametrize("number", [0, 65, -9, True, "TERM", None])
def test_number_that_is_no_signal_is_refused(number: object) -> None:
    assert "signal is no integer" in refused({"id": 1, "op": "signal", "job": 1, "signal": number})


NO_TEXTS: list[object] = ["a\0b", "\0", "\ud800", "a\udfff", None, 1, True, ["a"], {}]


@pytest.mark.parametrize("text", [*NO_TEXTS, "x" * (r.MAX_TEXT_BYTES + 1), "é" * 65_536])
@pytest.mark.parametrize("place", ["argument", "value", "variable", "workdir", "hostname"])
def test_text_is_unicode_without_nul_and_within_its_bound(place: str, text: object) -> None:
    if place == "variable":
        if not isinstance(text, str):
            return  # JSON has no other keys
        refused({**SPAWN, "environment": {text: "x"}})
        return
    fields: dict[str, dict[str, object]] = {
        "argument": {"arguments": ["sh", text]},
        "value": {"environment": {"A": text}},
        "workdir": {"workdir": f"/{text}" if isinstance(text, str) else text},
        "hostname": {"hostname": text},
    }
    refused({**SPAWN, **fields[place]})


def test_text_at_its_bound_is_taken() -> None:
    longest = "x" * r.MAX_TEXT_BYTES
    assert spawn(arguments=["sh", longest]).order.arguments[1] == longest


@pytest.mark.parametrize(
    "fields",
    [
        {"arguments": []},
        {"arguments": [""]},
        {"arguments": "sh"},
        {"arguments": {"0": "sh"}},
        {"arguments": ["x"] * (r.MAX_ARGUMENTS + 1)},
        {"environment": {"": "x"}},
        {"environment": {"A=B": "x"}},
        {"environment": [["A", "b"]]},
        {"environment": None},
        {"hostname": ""},
        {"hostname": "x" * 64},
        {"hostname": "é" * 32},
        {"workdir": "tmp"},
        {"workdir": " /tmp"},
    ],
    ids=lambda fields: str(fields)[:40],
)
def test_order_out_of_bounds_is_refused(fields: dict[str, object]) -> None:
    refused({**SPAWN, **fields})


def test_variables_are_bounded_in_number() -> None:
    """A client's most, with the job's id."""
    most = {f"V{number}": "" for number in range(MAX_VARIABLES)} | {"JOBWORKER_JOB_ID": "3"}
    assert len(spawn(environment=most).order.environment) == r.MAX_VARIABLES
    assert "at most 49153 texts" in refused({**SPAWN, "environment": most | {"W": ""}})


@pytest.mark.parametrize("text", ["\0", "\ud800", 7, None, ["x"]])
@pytest.mark.parametrize("length", [1, 100_000])
def test_text_among_many_is_checked(text: object, length: int) -> None:
    """Many short texts are checked together, and each alone where one is long."""
    arguments = ["x" * length, *["x"] * 1000, text, *["é"] * 1000]
    assert "argument" in refused({**SPAWN, "arguments": arguments})
    environment = {str(number): value for number, value in enumerate(arguments)}
    assert "variable" in refused({**SPAWN, "environment": environment})


def test_arguments_and_environment_are_bounded_together() -> None:
    piece = "x" * 100_000
    half = {f"V{number}": piece for number in range(5)}
    spawn(arguments=[piece] * 5, environment=half)
    assert "exceed 1 MiB" in refused({**SPAWN, "arguments": [piece] * 6, "environment": half})
    many = {f"{number:0100000}": "" for number in range(11)}
    assert "exceed 1 MiB" in refused({**SPAWN, "environment": many})


def is_sound_text(value: object) -> bool:
    return isinstance(value, str) and "\0" not in value and value.encode().decode() == value


near_spawns: st.SearchStrategy[dict[str, object]] = st.dictionaries(
    st.sampled_from(sorted(SPAWN)), plain_values, max_size=2
).map(lambda changed: {**SPAWN, **changed})
near_texts: st.SearchStrategy[dict[str, object]] = st.builds(
    lambda arguments, environment, hostname, workdir: {
        **SPAWN,
        "arguments": arguments,
        "environment": environment,
        "hostname": hostname,
        "workdir": workdir,
    },
    st.lists(any_text, min_size=1, max_size=3),
    st.dictionaries(any_text, any_text, max_size=2),
    any_text,
    any_text.map(lambda text: f"/{text}"),
)
anything: st.SearchStrategy[dict[str, object]] = st.dictionaries(
    st.sampled_from([*SPAWN, "signal", "cause", "kill_in_ms"]) | any_text, plain_values
)


@examples(max_examples=500)
@given(near_spawns | near_texts | anything)
@example({**SPAWN, "op": "kill", "job": True})
def test_whatever_is_asked_is_refused_or_within_every_bound(message: dict[str, object]) -> None:
    try:
        number, request = parse(message)
    except ProtocolError as error:
        str(error).encode()
        return
    if isinstance(request, r.TimesOfTurns | r.PromisedBytes | r.Hello | r.Ping):
        return
    if isinstance(request, r.ListJobs):
        assert 0 <= request.after <= r.MAX_NUMBER
        return
    if isinstance(request, r.VolumeRequest):
        if isinstance(request, r.MakeVolume):
            assert MIN_DISK_BYTES <= request.size <= MAX_DISK_BYTES
        if not isinstance(request, r.ListVolumes):
            assert name_fault(request.name) is None
        return
    job = 1 if isinstance(request, r.PlanOf) else request.job
    numbers = [number, job]
    if isinstance(request, r.Signal | r.Kill) and request.ask is not None:
        assert request.ask.cause in CAUSES
        numbers.append(request.ask.kill_in_ms)
    if isinstance(request, r.Signal):
        numbers.append(request.number)
        assert 1 <= request.number <= 64
    if isinstance(request, r.Spawn | r.PlanOf):
        numbers.extend(value for value in request.limits if isinstance(value, int))
        order = request.order
        words = (*order.arguments, *order.environment, *order.environment.values())
        assert all(is_sound_text(word) for word in (*words, order.hostname, order.workdir))
        assert sum(len(word.encode()) + 1 for word in words) <= r.MAX_ORDER_BYTES
        assert order.arguments[0]
        assert order.workdir == "" or order.workdir[0] == "/"
        assert 1 <= len(order.hostname.encode()) <= 63
        assert order.network in r.NETWORKS
        assert 0 <= order.uid <= 65_535
        assert 0 <= order.gid <= 65_535
        assert order.disk_bytes == 0 or MIN_DISK_BYTES <= order.disk_bytes <= MAX_DISK_BYTES
        assert not order.runtime or name_fault(order.runtime) is None
        for name, place in order.volumes:
            assert (name_fault(name), place_fault(place)) == (None, None)
    assert all(type(value) is int and 0 <= value <= r.MAX_NUMBER for value in numbers)
    assert job >= 1


# --- volumes, disks and runtimes ------------------------------------------------------------


def test_volumes_and_root_of_a_job_are_taken_as_sent() -> None:
    storage = {"disk_bytes": 16 << 20, "runtime": "small", "volumes": [["a", "/a"], ["b", "/b"]]}
    _, request = parse({**SPAWN, **storage})
    assert isinstance(request, r.Spawn)
    assert request.order.volumes == (("a", "/a"), ("b", "/b"))
    assert (request.order.disk_bytes, request.order.runtime) == (16 << 20, "small")


@pytest.mark.parametrize(
    "change",
    [
        {"disk_bytes": 1},
        {"disk_bytes": -1},
        {"disk_bytes": True},
        {"runtime": "a/b"},
        {"runtime": None},
        {"volumes": {}},
        {"volumes": [["a"]]},
        {"volumes": ["ab"]},
        {"volumes": [["../a", "/a"]]},
        {"volumes": [["a", "/proc/1"]]},
        {"volumes": [["a", "/"]]},
        {"volumes": [["a", "/x/../dev"]]},
        {"volumes": [["a", "/a"], ["a", "/b"]]},
        {"volumes": [["a", "/a"], ["b", "/a/b"]]},
        {"volumes": [["a", "/a/b"], ["b", "/a"]]},
        {"volumes": [[f"v{n}", f"/v{n}"] for n in range(17)]},
    ],
)
def test_storage_out_of_bounds_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ProtocolError):
        parse({**SPAWN, **change})


@pytest.mark.parametrize(
    "message",
    [
        {"id": 1, "op": "volume.create", "name": "a", "size_bytes": 1, "thin": True},
        {"id": 1, "op": "volume.create", "name": "a", "size_bytes": 1 << 60, "thin": True},
        {"id": 1, "op": "volume.create", "name": "a", "size_bytes": 1 << 24},
        {"id": 1, "op": "volume.create", "name": "a", "size_bytes": 1 << 24, "thin": 1},
        {"id": 1, "op": "volume.create", "name": "../a", "size_bytes": 1 << 24, "thin": True},
        {"id": 1, "op": "volume.remove", "name": ""},
        {"id": 1, "op": "volume.remove"},
        {"id": 1, "op": "volume.mount", "name": "a"},
    ],
)
def test_bad_request_about_a_volume_is_refused(message: dict[str, object]) -> None:
    with pytest.raises(ProtocolError):
        parse(message)


@pytest.mark.parametrize(
    "message",
    [
        SPAWN,
        {**SPAWN, "op": "plan"},
        {"id": 1, "op": "kill", "job": 1},
        {"id": 1, "op": "list", "after": 0},
        {"id": 1, "op": "volume.list"},
        {"id": 1, "op": "ping"},
        {"id": 1, "op": "hello", "protocol": 2},
    ],
)
def test_field_that_is_not_known_is_refused_by_name(message: dict[str, object]) -> None:
    parse(message)
    assert "knows no field 'gpu_memory'" in refused({**message, "gpu_memory": 7})
