"""A launcher whose helpers fail for a moment: what could not be done then is done later."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobworker.sandbox import channel
from jobworker.sandbox.protocol.policy import LauncherPolicy
from jobworker.sandbox.service import launch
from jobworker.sandbox.service.launch import start_launcher

from .conftest import child_of
from .test_launcher import Service, make_policy  # noqa: F401 - a fixture

NO_PROCESS = """
import sys; sys.path.insert(0, sys.argv[1])
import errno
from jobworker.sandbox.launcher import volume_losses
refusals = [errno.EAGAIN, errno.ENOMEM, errno.EMFILE] * 10
volume_losses.INSPECT_AGAIN_SECONDS = 0.001
class Refusing(volume_losses.Chores):
    def start(self, work, done, holding=()):
        if len(refusals) % 2:
            done({"errno": refusals.pop(), "detail": "on purpose", "begun": False})
        elif refusals:
            raise OSError(refusals.pop(), "on purpose")
        else:
            super().start(work, done, holding)
volume_losses.Chores = Refusing
from jobworker.sandbox.launcher.main import main; main(int(sys.argv[2]))
"""
"""A launcher that finds no process, many times, to look after a job's volumes."""

KILLED_PROCESS = """
import sys; sys.path.insert(0, sys.argv[1])
import os
from jobworker.sandbox.launcher import volume_losses
volume_losses.INSPECT_AGAIN_SECONDS = 0.001
def find(volumes):
    os._exit(9)
volume_losses._find_losses = find
from jobworker.sandbox.launcher.main import main; main(int(sys.argv[2]))
"""
"""A launcher whose process that looks after a job's volumes is killed each time."""

NO_WATCH = """
import sys; sys.path.insert(0, sys.argv[1])
import errno
from jobworker.sandbox.launcher import children
unwatched = [NAMES]
class Refusing(children.EventLoop):
    def watch(self, descriptor, call):
        name = getattr(getattr(call, "func", call), "__qualname__", "")
        if name in unwatched:
            unwatched.remove(name)
            raise OSError(errno.ENOSPC, "on purpose")
        super().watch(descriptor, call)
children.EventLoop = Refusing
from jobworker.sandbox.launcher.main import main; main(int(sys.argv[2]))
"""
"""A launcher that cannot watch a child by the method of one of these names, once."""

FAULT = """
import sys; sys.path.insert(0, sys.argv[1])
from jobworker.sandbox.launcher import children, ends
from jobworker.sandbox import event_loop as turns
from jobworker.sandbox.launcher.child import Child
from jobworker.sandbox.launcher.children import ChildPool
from jobworker.sandbox.launcher.jobs import Jobs
from jobworker.sandbox.launcher.volume_losses import VolumeLosses
turns.AGAIN_SECONDS = 0.01
struck = []
def call(*given, call=OWNER.NAME):
    if not struck:
        struck.append(given)
        raise KeyError("on purpose")
    return call(*given)
OWNER.NAME = call
from jobworker.sandbox.launcher.main import main; main(int(sys.argv[2]))
"""
"""A launcher in which the first call of a function meets a fault that nobody foresaw."""

FAULTY_LATE_START = """
import sys; sys.path.insert(0, sys.argv[1])
from jobworker.sandbox.launcher.child_supply import ChildSupply
waits = [True]
def must_wait(supply, order, must_wait=ChildSupply.must_wait):
    is_second = supply._jobs.count and waits
    return waits.pop() if is_second else must_wait(supply, order)
def give(supply, start, give=ChildSupply.give):
    if start.request.job == 2:
        raise KeyError("on purpose")
    return give(supply, start)
ChildSupply.must_wait, ChildSupply.give = must_wait, give
from jobworker.sandbox.launcher.main import main; main(int(sys.argv[2]))
"""
"""A launcher whose second start waits for the end of the first, and meets a fault then."""

BAD_SPARES = """
import sys; sys.path.insert(0, sys.argv[1])
from jobworker.sandbox.disk import images as disk_images
disk_images.lost_writes = lambda root: True
from jobworker.sandbox.launcher.main import main; main(int(sys.argv[2]))
"""
"""A launcher whose every spare has a disk that lost what was written to it."""


@pytest.fixture
def serving(
    make_policy: Callable[..., LauncherPolicy],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[..., Service]]:
    """Starts a launcher by a program and with changes of its policy."""
    made: list[Service] = []

    def serve(bootstrap: str, **policy: object) -> Service:
        monkeypatch.setattr(launch, "_BOOTSTRAP", bootstrap)
        changed = make_policy()._replace(**policy)  # type: ignore[arg-type]
        made.append(Service(start_launcher(changed), changed))
        return made[-1]

    yield serve
    for service in made:
        service.sock.close()
        assert service.leaves() == 0


@pytest.mark.parametrize(
    ("bootstrap", "unseen"),
    [pytest.param(NO_PROCESS, [], id="none"), pytest.param(KILLED_PROCESS, ["kept"], id="killed")],
)
def test_volumes_that_could_not_be_looked_at_are_not_told_as_lost(
    serving: Callable[..., Service], bootstrap: str, unseen: list[str]
) -> None:
    service = serving(bootstrap)
    volume = {"name": "kept", "size_bytes": 16 << 20, "thin": False}
    assert "ok" in service.ask("volume.create", 1, **volume)[0]
    writes = ("sh", "-c", "echo kept > /volumes/kept/file")
    _, descriptors = service.spawn(1, *writes, volumes=[["kept", "/volumes/kept"]])
    end = service.exit_of(1)
    assert (end["code"], end["lost"], end["unseen"]) == (0, [], unseen)
    for descriptor in descriptors:
        os.close(descriptor)
    assert "ok" in service.ask("remove", 1)[0]


@pytest.mark.parametrize("name", ["Ends._on_exit", "ChildMessages.read", "OomWatch._on_event"])
def test_child_that_cannot_be_watched_leaves_its_place(
    serving: Callable[..., Service], name: str
) -> None:
    service = serving(NO_WATCH.replace("NAMES", repr(name)), max_jobs=1, spares=0)
    reply, _ = service.spawn(1, "true")
    if name == "OomWatch._on_event" and "ok" in reply:
        pytest.skip("cgroup v2 has no event for want of memory")
    assert "on purpose" in str(reply["error"])
    reply, descriptors = service.spawn(2, "true")
    assert "ok" in reply, reply
    assert service.exit_of(2)["code"] == 0
    for descriptor in descriptors:
        os.close(descriptor)
    assert "ok" in service.ask("remove", 2)[0]


def test_start_waits_for_the_places_of_spares_that_are_no_good(
    serving: Callable[..., Service],
) -> None:
    service = serving(BAD_SPARES, max_jobs=1, spares=1)
    reply, descriptors = service.spawn(1, "sleep", "600")
    assert "ok" in reply, reply
    launcher = child_of(service.process.pid)
    children = Path(f"/proc/{launcher}/task/{launcher}/children")
    deadline = time.monotonic() + 20
    # The job has one of the two places; the other one is a spare's, once there is one again.
    while [_name_of(pid) for pid in children.read_text().split()].count("trampoline") < 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    reply, more = service.spawn(2, "true")
    assert "ok" in reply, reply
    for descriptor in (*descriptors, *more):
        os.close(descriptor)


def _name_of(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().strip("\0")
    except OSError:  # it has ended
        return ""


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        pytest.param("Child", "want", id="its end is looked into"),
        pytest.param("VolumeLosses", "_on_inspected", id="its volumes were looked at"),
        pytest.param("ends", "how_ended", id="its end is told"),
        pytest.param("ChildPool", "clear", id="its place is taken back"),
    ],
)
def test_end_that_meets_an_unforeseen_fault_is_told_and_leaves_no_place_taken(
    serving: Callable[..., Service], owner: str, name: str
) -> None:
    bootstrap = FAULT.replace("OWNER", owner).replace("NAME", name)
    service = serving(bootstrap, max_jobs=1, spares=0)
    volume = {"name": "kept", "size_bytes": 16 << 20, "thin": False}
    assert "ok" in service.ask("volume.create", 1, **volume)[0]
    mounted = {"volumes": [["kept", "/volumes/kept"]]}
    for job in (1, 2):
        reply, descriptors = service.spawn(job, "sh", "-c", "exit 3", **mounted)
        assert "ok" in reply, reply
        assert service.exit_of(job)["code"] == 3
        assert "ok" in service.ask("remove", job)[0]
        for descriptor in descriptors:
            os.close(descriptor)
    event_loop = service.ask("turns", 0)[0]["ok"]
    assert isinstance(event_loop, dict)
    assert event_loop["incidents"] == 1, "the fault has struck"


def test_volume_whose_chore_meets_an_unforeseen_fault_is_told_of(
    serving: Callable[..., Service],
) -> None:
    loop = "from jobworker.sandbox.launcher.loop import Launcher"
    bootstrap = FAULT.replace("struck = []", f"{loop}\nstruck = []")
    service = serving(bootstrap.replace("OWNER", "Launcher").replace("NAME", "_on_volume"))
    reply, _ = service.ask("volume.create", 1, name="kept", size_bytes=16 << 20, thin=False)
    assert "incident" in str(reply["error"])
    listed = service.ask("volume.list", 1)[0]["ok"]
    assert isinstance(listed, dict)
    assert [volume["name"] for volume in listed["volumes"]] == ["kept"]


def test_start_that_waits_and_meets_an_unforeseen_fault_is_refused(
    serving: Callable[..., Service],
) -> None:
    service = serving(FAULTY_LATE_START)
    reply, descriptors = service.spawn(1, "sleep", "600")
    assert "ok" in reply, reply
    late = {"id": 1000, "op": "spawn", "job": 2, **service.fields("true")}
    channel.send(service.sock, late)
    assert "ok" in service.ask("remove", 1)[0]
    error = service.reply_to(1000)[0]["error"]
    assert "launcher's log has it as incident" in str(error)
    assert "ok" in service.spawn(3, "true")[0]
    channel.close_all(descriptors)


def test_removal_that_meets_an_unforeseen_fault_is_answered(
    serving: Callable[..., Service],
) -> None:
    bootstrap = FAULT.replace("OWNER", "Jobs").replace("NAME", "tell_cleared")
    service = serving(bootstrap, max_jobs=1, spares=0)
    for job in (1, 2):
        reply, descriptors = service.spawn(job, "sleep", "600")
        assert "ok" in reply, reply
        assert "ok" in service.ask("remove", job)[0]
        channel.close_all(descriptors)
    event_loop = service.ask("turns", 0)[0]["ok"]
    assert isinstance(event_loop, dict)
    assert event_loop["incidents"] == 1, "the fault has struck"


def test_removal_is_answered_though_nothing_can_watch_what_clears_away(
    serving: Callable[..., Service],
) -> None:
    service = serving(NO_WATCH.replace("NAMES", "'Chores._on_exit', 'ForkServer._on_exit'"))
    reply, descriptors = service.spawn(1, "sleep", "600")
    assert "ok" in reply, reply
    assert "ok" in service.ask("remove", 1)[0]
    channel.close_all(descriptors)
