"""The table of the launcher's protocol: what it writes, byte for byte, and what it reads."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import get_args

import pytest

from jobworker.errors import ProtocolError
from jobworker.sandbox.cgroup.accounting import ScopeLimits, ScopeUsage
from jobworker.sandbox.event_loop import TurnTimes
from jobworker.sandbox.protocol import events
from jobworker.sandbox.protocol import operations as ops
from jobworker.sandbox.protocol import replies as a
from jobworker.sandbox.protocol import requests as q
from jobworker.sandbox.protocol.end_requests import EndRequest, EndRequestReport
from jobworker.sandbox.protocol.fields import Malformed
from jobworker.sandbox.start.plan import Order

ORDER = Order("job-3", ("sh", "-c", ""), {"A": "b"}, "/tmp", volumes=(("data", "/data"),))
LIMITS = ScopeLimits(100, 4 << 20, 0, 5, "0-1")
START = (
    '"hostname":"job-3","arguments":["sh","-c",""],"environment":{"A":"b"},"workdir":"/tmp",'
    '"network":"host","uid":0,"gid":0,"disk_bytes":0,"runtime":"","volumes":[["data","/data"]],'
    '"init":false,"cpu_percent":100,"memory_bytes":4194304,"io_bps":0,"pids":5,"cores":"0-1"'
)
REQUESTS: list[tuple[q.Request, str]] = [
    (q.Hello(2), '"op":"hello","protocol":2'),
    (q.Ping(), '"op":"ping"'),
    (q.Spawn(3, ORDER, LIMITS), f'"op":"spawn","job":3,{START}'),
    (q.PlanOf(ORDER, LIMITS), f'"op":"plan",{START}'),
    (q.GiveUpStart(3), '"op":"give_up","job":3'),
    (q.Signal(3, 15), '"op":"signal","job":3,"signal":15'),
    (
        q.Signal(3, 15, EndRequest("stop", 7)),
        '"op":"signal","job":3,"signal":15,"cause":"stop","kill_in_ms":7',
    ),
    (q.Kill(3), '"op":"kill","job":3'),
    (q.Kill(3, EndRequest("timeout", 0)), '"op":"kill","job":3,"cause":"timeout","kill_in_ms":0'),
    (q.Remove(3), '"op":"remove","job":3'),
    (q.UsageOf(3), '"op":"usage","job":3'),
    (q.ListJobs(8), '"op":"list","after":8'),
    (q.TimesOfTurns(), '"op":"turns"'),
    (q.PromisedBytes(), '"op":"promised"'),
    (
        q.MakeVolume("data", 1 << 24, thin=True),
        '"op":"volume.create","name":"data","size_bytes":16777216,"thin":true',
    ),
    (q.RemoveVolume("data"), '"op":"volume.remove","name":"data"'),
    (q.ListVolumes(), '"op":"volume.list"'),
]
USED = ScopeUsage(1, 2, 3, 4, 5, 6, 7, 8)
USED_WORDS = (
    '{"cpu_ns":1,"memory_bytes":2,"memory_peak_bytes":3,"read_bytes":4,"write_bytes":5,"pids":6,'
    '"throttled_ns":7,"oom_kills":8}'
)
HOW = a.HowEnded(None, 9, ("", "data"), ("more",), "host")
HOW_WORDS = '"code":null,"signal":9,"lost":["","data"],"unseen":["more"],"want":"host"'
ENTRIES = a.JobEntries(
    (
        a.JobEntry(1, 20, 7.5, 1.5, HOW, USED, True, "it broke", None),
        a.JobEntry(
            2, 21, 1.0, 9.0, None, USED, False, "", EndRequestReport("stop", 1.0, -2.0, (9, 15))
        ),
    ),
    more=False,
    unstarted=(4, 3),
)
ENTRY_WORDS = (
    '{"job":1,"pid":20,"age_seconds":7.5,"ended_seconds_ago":1.5,"exit":{'
    f'{HOW_WORDS}}},"usage":{USED_WORDS},"measured":true,"network_end":"it broke","asked":null}},'
    '{"job":2,"pid":21,"age_seconds":1.0,"ended_seconds_ago":9.0,"exit":null,"usage":'
    f'{USED_WORDS},"measured":false,"network_end":"","asked":{{"cause":"stop","seconds_ago":1.0,'
    '"kill_in_seconds":-2.0,"signals":[9,15]}}'
)
REPLIES: list[tuple[str, ops.Reply, str]] = [
    ("hello", a.Done(), "{}"),
    ("spawn", a.Spawned(20), '{"pid":20}'),
    ("plan", a.Steps((("a", "b", "c"),)), '{"steps":[["a","b","c"]]}'),
    ("give_up", a.GivenUp(True), '{"given_up":true}'),
    ("signal", a.Delivered(False), '{"delivered":false}'),
    ("usage", USED, USED_WORDS),
    (
        "turns",
        TurnTimes(3, 1.5, "_on_exit", 1, 0),
        '{"turns":3,"longest_ms":1.5,"slowest":"_on_exit","over_bound":1,"incidents":0}',
    ),
    ("promised", a.Promised(5), '{"bytes":5}'),
    ("list", ENTRIES, f'{{"jobs":[{ENTRY_WORDS}],"more":false,"unstarted":[4,3]}}'),
    (
        "volume.list",
        a.VolumeEntries((a.VolumeEntry("data", 1 << 24, 4096, True, 2),)),
        '{"volumes":[{"name":"data","size_bytes":16777216,"used_bytes":4096,"thin":true,"jobs":2}]}',
    ),
]
EVENTS: list[tuple[events.Event, str]] = [
    (
        events.JobEnded(3, 0.5, HOW, USED, True),
        f'{{"event":"exit","job":3,"ended_seconds_ago":0.5,{HOW_WORDS},"usage":{USED_WORDS},'
        '"measured":true}',
    ),
    (events.NetworkEnded(3, "it died"), '{"event":"network_ended","job":3,"why":"it died"}'),
]
ROWS = {row.name: row for row in ops.ROWS}


def body(message: Mapping[str, object]) -> str:
    return json.dumps(message, ensure_ascii=False, separators=(",", ":"))


@pytest.mark.parametrize(("request_", "words"), REQUESTS)
def test_request_is_written_as_ever_and_read_as_it_was(request_: q.Request, words: str) -> None:
    written = body(ops.request_message(7, request_))
    assert written == f'{{"id":7,{words}}}'
    assert ops.parse(json.loads(written)) == (7, request_)


@pytest.mark.parametrize(("name", "reply", "words"), REPLIES)
def test_reply_is_written_as_ever_and_read_as_it_was(
    name: str, reply: ops.Reply, words: str
) -> None:
    written = body(ops.answer(ROWS[name], reply))
    assert written == f'{{"ok":{words}}}'
    assert ops.read_reply(ROWS[name], json.loads(written)) == reply


@pytest.mark.parametrize(("event", "words"), EVENTS)
def test_event_is_written_as_ever_and_read_as_it_was(event: events.Event, words: str) -> None:
    written = body(events.message_of(event))
    assert written == words
    assert events.read(json.loads(written)) == event


def test_every_request_has_its_row() -> None:
    assert {row.request for row in ops.ROWS} == set(get_args(q.Request))
    assert {type(request) for request, _ in REQUESTS} == set(get_args(q.Request))
    assert len(ROWS) == len(ops.ROWS)


Way = tuple[str | int, ...]
"""The keys and indices that lead to a value of a message."""


def members(told: object) -> list[tuple[Way, object]]:
    """Every value in a message, with the way to it."""
    inner = told.items() if isinstance(told, dict) else enumerate(told)  # type: ignore[arg-type]
    found: list[tuple[Way, object]] = []
    for key, value in inner:
        found.append(((key,), value))
        if isinstance(value, dict | list):
            found += [((key, *way), each) for way, each in members(value)]
    return found


def changed(told: str, way: Way, value: object) -> Mapping[str, object]:
    message = json.loads(told)
    place = message
    for key in way[:-1]:
        place = place[key]
    place[way[-1]] = value
    assert isinstance(message, dict)
    return message


def faults(read: Callable[[Mapping[str, object]], object], told: str, way: Way) -> list[str]:
    """What is said of a message, for each value that one of its members may have instead."""
    found = []
    for value in STRANGE:
        try:
            read(changed(told, way, value))
        except Malformed as fault:
            found.append(str(fault))
    return found


END = {"event": "exit", "job": 3, "code": 0, "signal": None, "usage": {"pids": 0}}
ENTRY = {"job": 1, "pid": 2, "age_seconds": 7.0, "exit": None}
"""What the launchers of all releases tell."""
STRANGE: list[object] = [None, True, 1, -1, 1 << 80, 1.5, float("nan"), "word", [], ["x"], {}]


@pytest.mark.parametrize(("name", "reply", "words"), REPLIES)
def test_reply_that_does_not_fit_is_one_error_that_names_its_operation(
    name: str, reply: ops.Reply, words: str
) -> None:
    told = f'{{"ok":{words}}}'
    for way, _ in members(json.loads(told)):
        found = faults(partial(ops.read_reply, ROWS[name]), told, way)
        assert found or way[-1] == "want", way
        assert all(fault.startswith(f"the reply to {name}: ") for fault in found)
    for message in ({}, {"ok": None}, {"ok": [1]}, {"error": 1}, {"error": {"step": "x"}}):
        with pytest.raises(Malformed, match=f"the reply to {name}: "):
            ops.read_reply(ROWS[name], message)


@pytest.mark.parametrize(("event", "words"), EVENTS)
def test_event_that_does_not_fit_is_one_error_that_names_it(
    event: events.Event, words: str
) -> None:
    for way, _ in members(json.loads(words))[1:]:
        found = faults(events.read, words, way)
        assert found or way[-1] == "want", way
        assert all(fault.startswith("the event ") for fault in found)


def test_pid_that_is_none_is_named() -> None:
    with pytest.raises(Malformed, match="the reply to spawn: pid is no integer"):
        ops.read_reply(ops.SPAWN, {"ok": {"pid": "20"}})
    with pytest.raises(Malformed, match="the event exit: job is no integer"):
        events.read({"event": "exit", "code": 0, "signal": None, "usage": {}})


@pytest.mark.parametrize("key", ["job", "code", "signal", "usage"])
def test_what_the_word_of_an_end_always_has_is_needed(key: str) -> None:
    message = {**END}
    del message[key]
    with pytest.raises(Malformed, match=f"the event exit: {key} is no"):
        events.read(message)


@pytest.mark.parametrize("key", ["job", "pid", "age_seconds", "exit"])
def test_what_the_list_of_jobs_always_has_is_needed(key: str) -> None:
    entry = {**ENTRY}
    del entry[key]
    with pytest.raises(Malformed, match=f"the reply to list: {key} is no"):
        ops.read_reply(ops.LIST, {"ok": {"jobs": [entry], "more": False}})


def test_what_an_earlier_launcher_does_not_tell_has_its_default() -> None:
    assert events.read(END) == events.JobEnded(
        3, 0.0, a.HowEnded(0, None, (), (), None), ScopeUsage(), True
    )
    assert ops.read_reply(ops.LIST, {"ok": {"jobs": [ENTRY], "more": False}}) == a.JobEntries(
        (a.JobEntry(1, 2, 7.0, 0.0, None, ScopeUsage(), True, "", None),), more=False, unstarted=()
    )
    refused = {"error": {"step": "job", "errno": 3, "detail": "no such job"}}
    assert ops.read_reply(ops.KILL, refused) == a.Refusal("job", 3, "no such job")


def test_what_a_later_launcher_tells_in_addition_is_passed_over() -> None:
    assert ops.read_reply(ops.SPAWN, {"ok": {"pid": 2, "gpu": 1}}) == a.Spawned(2)
    assert events.read({"event": "gpu_lost", "job": 1}) is None
    assert events.read({"event": ["exit"], "job": 1}) is None


def test_request_may_name_a_job_where_it_is_about_none() -> None:
    """It always might: a client may name one in each."""
    assert ops.parse({"id": 1, "op": "volume.list", "job": None}) == (1, q.ListVolumes())
    with pytest.raises(ProtocolError, match="cannot take the request: job is no integer"):
        ops.parse({"id": 1, "op": "kill", "job": None})
