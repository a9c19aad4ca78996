"""Whatever a caller gives, what is wrong with it is one kind of error, and nothing is sent."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

import jobworker
from jobworker.client.client import Client
from jobworker.errors import CredentialsUnusable, InvalidParams, JobworkerError, LoopMissing
from jobworker.model.job import JobSpec, Stream
from jobworker.model.lifecycle import State
from jobworker.pki.administration import init_authority
from jobworker.protocol import messages as m

from .memory_servers import RECORD, connected

Use = Callable[[Client], Awaitable[object]]

ENDLESS: list[object] = []
ENDLESS.append(ENDLESS)
LOOP: dict[str, Any] = {}
LOOP["x"] = LOOP


class Failing:
    """What cannot be looked through, by a fault of its own."""

    def __iter__(self) -> Iterator[str]:
        raise RuntimeError("boo")

    def __repr__(self) -> str:
        raise RuntimeError("boo")


class Net(StrEnum):
    """A caller's own enumeration."""

    PRIVATE = "private"


BAD: dict[str, Use] = {
    "list(limit=0)": lambda client: client.list(limit=0),
    "list(limit='5')": lambda client: client.list(limit="5"),  # type: ignore[arg-type]
    "list(before=0)": lambda client: client.list(before=0),
    "list(states=['SLEEPING'])": lambda client: client.list(states=["SLEEPING"]),
    "list(states=7)": lambda client: client.list(states=7),  # type: ignore[arg-type]
    "list(labels=['a'])": lambda client: client.list(labels=["a"]),  # type: ignore[arg-type]
    "list(labels={'-': 'x'})": lambda client: client.list(labels={"-": "x"}),
    "job(0).status()": lambda client: client.job(0).status(),
    "job('7').status()": lambda client: client.job("7").status(),  # type: ignore[arg-type]
    "job(1.5).wait()": lambda client: client.job(1.5).wait(),  # type: ignore[arg-type]
    "job(True).wait()": lambda client: client.job(True).wait(),
    "job(-1).remove()": lambda client: client.job(-1).remove(),
    "job(1 << 63).remove()": lambda client: client.job(1 << 63).remove(),
    "stop(grace=-1)": lambda client: client.job(7).stop(grace_seconds=-1),
    "stop(grace=nan)": lambda client: client.job(7).stop(grace_seconds=float("nan")),
    "stop(signal=9)": lambda client: client.job(7).stop(signal=9),  # type: ignore[arg-type]
    "output(offset=-1)": lambda client: anext(client.job(7).output(offset=-1)),
    "output(tail_lines=-1)": lambda client: anext(client.job(7).output(tail_lines=-1)),
    "output(streams=['x'])": lambda client: anext(client.job(7).output(streams=["x"])),
    "output(since='10m')": lambda client: anext(client.job(7).output(since="10m")),  # type: ignore[arg-type]
    "output(since=-1s)": lambda client: anext(client.job(7).output(since=timedelta(seconds=-1))),
    "run(['\\udcff'])": lambda client: client.run(["\udcff"]),
    "output(on_break=5)": lambda client: anext(client.job(7).output(on_break=5)),  # type: ignore[arg-type]
    "run(follow='x')": lambda client: client.run(["true"], follow="x"),  # type: ignore[arg-type]
    "run([b'ls'])": lambda client: client.run([b"ls"]),  # type: ignore[list-item]
    "run([1])": lambda client: client.run(["sleep", 1]),  # type: ignore[list-item]
    "run(5)": lambda client: client.run(5),  # type: ignore[arg-type]
    "run(what holds itself)": lambda client: client.run(ENDLESS),  # type: ignore[arg-type]
    "run(what fails)": lambda client: client.run(Failing()),  # type: ignore[arg-type]
    "list(labels that hold themselves)": lambda client: client.list(labels=LOOP),
    "run('ls -l')": lambda client: client.run("ls -l"),
    "run(JobSpec of surrogates)": lambda client: client.run(JobSpec(command=("a", "\udcff"))),
    "run(JobSpec of a string)": lambda client: client.run(JobSpec(command="ls")),  # type: ignore[arg-type]
    "run(environment of numbers)": lambda client: client.run(
        JobSpec(command=("a",), environment={"A": 1})  # type: ignore[dict-item]
    ),
    "plan([])": lambda client: client.plan([]),
    "make_volume(size='big')": lambda client: client.make_volume("a", "big"),  # type: ignore[arg-type]
    "make_volume(name='..')": lambda client: client.make_volume("..", 64 << 20),
    "remove_volume(None)": lambda client: client.remove_volume(None),  # type: ignore[arg-type]
    "prune(keep_jobs='x')": lambda client: client.prune(m.PruneParams(keep_jobs="x")),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("use", BAD.values(), ids=BAD.keys())
async def test_bad_value_is_an_error_of_the_parameters_and_is_not_sent(use: Use) -> None:
    async with connected() as (client, peer):
        with pytest.raises(InvalidParams, match="cannot "):
            await use(client)
        await wait_all_tasks_blocked()
        with pytest.raises(trio.WouldBlock):
            peer.sent.receive_nowait()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: jobworker.Limits(cpu_percent=-1), "cannot make a Limits: cpu_percent: must be"),
        (lambda: JobSpec(command=()), "cannot make a JobSpec: command: is empty"),
        (lambda: JobSpec(command=("a", 1)), r"JobSpec: command\[1\]: must be a string"),  # type: ignore[arg-type]
        (
            lambda: JobSpec(command=["a", Path("/b")]),  # type: ignore[arg-type]
            r"cannot make a JobSpec: command\[1\]: cannot be made of a PosixPath$",
        ),
        (
            lambda: JobSpec(command=("a",), environment={"A": "b", "C": Path("/d")}),  # type: ignore[dict-item]
            r"cannot make a JobSpec: environment\['C'\]: cannot be made of a PosixPath$",
        ),
        (
            lambda: JobSpec(command=("a",), volumes=[{"name": "v", "path": ""}]),  # type: ignore[arg-type]
            r"cannot make a JobSpec: volumes\[0\]: cannot be made of a dict$",
        ),
        (lambda: JobSpec(command={"a"}), "JobSpec: command: cannot be made of a set$"),  # type: ignore[arg-type]
        (lambda: JobSpec(command=("a",), labels={"": "x"}), "labels: "),
        (lambda: JobSpec(command=Failing()), "cannot make a JobSpec: command: cannot be read: boo"),  # type: ignore[arg-type]
        (JobSpec, "cannot make a JobSpec: command: is missing"),
        *(
            (partial(JobSpec, command=("a",), **{name: value}), f"make a JobSpec: {name}: {told}")  # type: ignore[arg-type]
            for name, value, told in [
                ("limits", None, "must be an object"),
                ("limits", "x", "must be an object"),
                ("limits", {"cpu_percent": 50}, "cannot be made of a dict"),
                ("network", "bridge", "must be one of host, none, private"),
                ("at_max_output", "boom", "must be one of discard-output, stop"),
                ("timeout_seconds", "60", "must be a number"),
            ]
        ),
        (lambda: JobSpec(["ls"]), "cannot make a JobSpec: give its values by name"),  # type: ignore[call-arg, arg-type]
        (lambda: JobSpec(command=("a",), bogus=1), "cannot make a JobSpec: unknown name 'bogus'"),  # type: ignore[call-arg]
        (lambda: jobworker.VolumeMount(name=".."), "cannot make a VolumeMount: name: "),
        (lambda: m.PruneParams(keep_jobs=-1), "cannot make a PruneParams: keep_jobs: "),
    ],
)
def test_what_cannot_be_made_is_an_error_of_the_same_kind(
    make: Callable[[], object], words: str
) -> None:
    with pytest.raises(InvalidParams, match=words):
        make()


@pytest.mark.parametrize(
    "use",
    [
        lambda client, long: client.run(long),
        lambda client, long: client.run([long, 1]),
        lambda _, long: JobSpec(command=("a",), environment={long: "b"}),
        lambda _, long: JobSpec(command=("a",), workdir=long),
        lambda _, long: JobSpec(command=("a",), labels={long: Path("/b")}),  # type: ignore[dict-item]
    ],
)
async def test_value_that_is_long_is_told_in_part(use: Callable[[Client, str], Any]) -> None:
    async with connected() as (client, _):
        with pytest.raises(InvalidParams) as refused:
            await use(client, "x y" * 10_000)
    assert len(str(refused.value)) < 1000


WRONG: tuple[object, ...] = (
    *(None, 5, -1, "x", b"x", 1.5, True, [5], ["x"], [["x"]], {"A": 5}, {5: "A"}, {"A": None}),
    *(
        {"x"},
        object(),
        datetime.now(UTC),
        1 << 80,
        float("nan"),
        print,
        (None,),
        ENDLESS,
        LOOP,
        Failing(),
    ),
)
LEAKS = re.compile(
    r"object of type|has no |not iterable|not subscriptable|expected|__init__|bytes-like"
)
"""Words of Python about code that the caller never saw."""


@pytest.mark.parametrize("value", WRONG, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (cls, field.name)
        for cls in (JobSpec, jobworker.Limits, jobworker.VolumeMount, jobworker.PruneParams)
        for field in attrs.fields(cls)
    ],
)
async def test_value_of_any_kind_is_taken_or_refused_in_our_words(
    cls: type, name: str, value: object
) -> None:
    needed: dict[str, object] = {"command": ("a",)} if cls is JobSpec else {}
    needed |= {"name": "a"} if cls is jobworker.VolumeMount else {}
    told = f": {name}"
    try:
        made = cls(**{**needed, name: value})
        if isinstance(made, JobSpec):
            async with connected() as (client, _):
                with trio.move_on_after(0):
                    await client.run(made)
    except InvalidParams as refused:
        told = refused.message
    assert f": {name}" in told
    assert not LEAKS.search(told)


@pytest.mark.parametrize(
    "since",
    ["x", "2026-01-01", 5, date(2026, 1, 1), timedelta(days=-1), timedelta(days=4000)],
    ids=str,
)
async def test_time_to_begin_at_is_refused_by_its_own_name(since: Any) -> None:
    async with connected() as (client, _):
        with pytest.raises(
            InvalidParams,
            match=r"job: since: must be (a datetime or a timedelta,|from 0 to 3650 days)",
        ):
            client.job(7).output(since=since)


async def test_pruning_takes_its_own_parameters_alone() -> None:
    async with connected() as (client, _):
        with pytest.raises(
            InvalidParams, match=r"cannot prune: .* must be PruneParams, not an integer"
        ):
            await client.prune(5)  # type: ignore[arg-type]


@pytest.mark.parametrize("seconds", ["x", -1, float("nan"), None, True, 10**400], ids=type)
@pytest.mark.parametrize("name", ["patience_seconds", "start_patience_seconds"])
async def test_patience_that_is_no_time_is_refused(name: str, seconds: object) -> None:
    opened = jobworker.open_client("host", ca="a", certificate="b", key="c", **{name: seconds})  # type: ignore[arg-type]
    with pytest.raises(InvalidParams, match=f"{name}: must be 0 or more seconds, not"):
        async with opened:
            pass


async def test_values_may_be_given_in_the_forms_that_python_has() -> None:
    seen: list[object] = []

    async with connected() as (client, peer), trio.open_nursery() as nursery:

        async def serve() -> None:
            for _ in range(4):
                call = await peer.call()
                seen.append(call.params)
                if call.method.name == "job.list":
                    peer.reply(call, m.ListResult(jobs=()))
                else:
                    peer.reply(call, m.RunResult(job=RECORD))

        nursery.start_soon(serve)
        await client.list(states={"RUNNING"})
        await client.list(states=iter([State.RUNNING]))
        await client.run(word for word in ("echo", "x"))  # type: ignore[arg-type]
        await client.run(JobSpec(command=("echo",), network=Net.PRIVATE))  # type: ignore[arg-type]
    running = m.ListParams(states=(State.RUNNING,))
    specs = JobSpec(command=("echo", "x")), JobSpec(command=("echo",), network="private")
    assert seen == [running, running, *(m.RunParams(job=spec) for spec in specs)]


async def test_moment_without_a_zone_is_local_time() -> None:
    naive = datetime(2026, 1, 31, 12)
    async with connected() as (client, _):
        output = client.job(7).output(since=naive, streams=["stdout"])
        assert output._params.since == naive.astimezone(UTC)
        assert output._params.streams == (Stream.STDOUT,)


def test_asyncio_is_told_in_words(tmp_path: Path) -> None:
    async def main() -> None:
        async with jobworker.open_client("host", ca="a", certificate="b", key="c"):
            raise AssertionError("there is no Trio")

    with pytest.raises(LoopMissing, match=r"no Trio event loop runs here; call it below trio\.run"):
        asyncio.run(main())


@pytest.mark.parametrize("address", [5, None, b"host"])
async def test_address_that_is_no_string(address: object) -> None:
    with pytest.raises(InvalidParams, match="cannot connect"):
        async with jobworker.open_client(address, ca="a", certificate="b", key="c"):  # type: ignore[arg-type]
            pass


@pytest.mark.parametrize("name", ["on_lost", "on_refused"])
async def test_what_is_to_hear_of_it_and_cannot_be_called(name: str) -> None:
    opened = jobworker.open_client("host", ca="a", certificate="b", key="c", **{name: 5})  # type: ignore[arg-type]
    with pytest.raises(InvalidParams, match=f"{name}: must be a function, not an integer"):
        async with opened:
            pass


async def test_files_that_are_no_paths() -> None:
    with pytest.raises(InvalidParams, match="cannot connect"):
        async with jobworker.open_client("host", ca=None, certificate="b", key="c"):  # type: ignore[arg-type]
            pass


@pytest.mark.parametrize("name", ["ca", "certificate", "key"])
@pytest.mark.parametrize("path", ["a\0b", "\ud800"], ids=["nul", "surrogate"])
async def test_path_that_no_file_can_have_is_an_error_of_the_files(
    tmp_path: Path, name: str, path: str
) -> None:
    init_authority(tmp_path / "certs", [], now=datetime.now(UTC))
    files = {
        "ca": tmp_path / "certs" / "ca-cert.pem",
        "certificate": tmp_path / "certs" / "admin-client-cert.pem",
        "key": tmp_path / "certs" / "admin-client-key.pem",
    }
    with pytest.raises(CredentialsUnusable, match="no file can have that path"):
        async with jobworker.open_client("host", **{**files, name: path}):  # type: ignore[arg-type]
            pass


def test_public_names_are_listed_and_there() -> None:
    assert set(jobworker.__all__) <= set(dir(jobworker))
    assert {"open_client", "JobSpec", "Limits", "JobworkerError"} <= set(jobworker.__all__)
    for name in jobworker.__all__:
        assert getattr(jobworker, name) is not None
    assert jobworker.JobworkerError is JobworkerError
