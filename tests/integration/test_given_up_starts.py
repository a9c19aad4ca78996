"""A start that is given up in the moment in which its program begins: what is told is true."""

import errno
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from attrs import asdict

from jobworker.errors import Busy
from jobworker.sandbox import channel
from jobworker.sandbox.protocol.policy import LauncherPolicy, policy_message
from jobworker.sandbox.service import launch
from jobworker.sandbox.service.launch import (
    LauncherProcess,
    OpenedLauncher,
    connect_launcher,
    launcher_command,
    start_launcher,
)

from .conftest import child_of, children_of, spares_of
from .test_launcher import Message, Service, make_policy  # noqa: F401 - a fixture

BEGINS_LATE = """
import sys; sys.path.insert(0, sys.argv[1])
import os, select, time
from jobworker.sandbox.launcher import child_maker, host_names
from jobworker.sandbox.start import trampoline
from jobworker.sandbox.launcher.child import Child
from jobworker.sandbox.launcher.starts import Starts
ending = []
def has_ended(init):  # whether the program has: its init is stopped, and collects nothing
    try:
        below = open(f"/proc/{init}/task/{init}/children").read().split()
        return any(" Z " in open(f"/proc/{pid}/stat").read() for pid in below)
    except OSError:
        return True
def send(child, exec_image):
    child._exec_image = exec_image
    os.pwrite(child.order, exec_image.image, 0)
def begin(child):
    if child.order >= 0:
        child.sock.send(trampoline.GO)
        os.close(child.order)
        child.order = -1
        if "MOMENT" == "before":
            end = select.poll()
            end.register(child.sock, 0)  # for its end alone, which tells that the program runs
            end.poll(20_000)
        elif child.report >= 0:
            deadline = time.monotonic() + 20
            while not has_ended(child.pid) and time.monotonic() < deadline:
                time.sleep(0.01)
        else:
            time.sleep(0.5)  # it is stopped: nothing ever tells that it does nothing
    while "MOMENT" == "greedy" and not child.want():
        time.sleep(0.01)
def hear(child, hear=Child.hear):
    try:
        return hear(child)
    except BlockingIOError:
        if ending and child.request is not None:
            begin(child)
        raise
def give_up(starts, child, why, give_up=Starts._give_up_child):
    if "MOMENT" == "before":
        begin(child)
    ending.append(child)
    return give_up(starts, child, why)
def undo(starts, undo=Starts.undo_all):
    if "MOMENT" == "before":
        for child in starts._jobs._jobs.values():
            begin(child)
    ending.append(starts)
    undo(starts)
host_names.HostNames.set = lambda names, pidfd, name, done: done({})  # the order is there at once
if "MOMENT" == "never":
    child_maker.become_job = lambda *_: time.sleep(600)
Child.send, Child.hear = send, hear
Starts._give_up_child, Starts.undo_all = give_up, undo
from jobworker.sandbox.launcher.main import main; main(int(sys.argv[2]))
"""
"""A launcher that lets a job's program begin only at MOMENT: before its start is given up, or after
the look whether it has begun, before the kill. There a greedy one takes more memory than it may. Or
never: no child gets on with its preparation."""

NO_PLACE = """
import sys; sys.path.insert(0, sys.argv[1])
import errno
from jobworker.sandbox.launcher import child_supply, starts, service_connection as service_link
starts.START_SECONDS = 1.0
child_supply.ChildSupply.must_wait = lambda *_: True
class Broken(service_link.Outbox):
    def send(self, message, descriptors):
        if "error" in message:
            raise OSError(errno.ENOBUFS, "on purpose")
        super().send(message, descriptors)
service_link.Outbox = Broken
from jobworker.sandbox.launcher.main import main; main(int(sys.argv[2]))
"""
"""A launcher whose starts wait for a place in vain, and whose word of that ends the connection."""


@pytest.fixture
def serving(
    make_policy: Callable[..., LauncherPolicy],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[[str], Service]]:
    """Starts a launcher whose jobs' programs begin at a moment."""
    made: list[Service] = []

    def serve(moment: str) -> Service:
        monkeypatch.setattr(launch, "_BOOTSTRAP", BEGINS_LATE.replace("MOMENT", moment))
        policy = make_policy()
        made.append(Service(start_launcher(policy), policy))
        return made[-1]

    yield serve
    for service in made:
        service.sock.close()
        assert service.leaves() == 0


class Outside:
    """A launcher that outlives its services."""

    def __init__(self, policy: LauncherPolicy) -> None:
        self._policy, self._path = policy, f"{Path(policy.stage).parent}/launcher.sock"
        self._latest: Service | None = None
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with near, far, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(self._path)
            listener.listen()
            command = launcher_command(far.fileno())
            self.process = subprocess.Popen(command, pass_fds=[far.fileno()], env={}, cwd="/")
            carries = {"service_uid": 0, "carries": ["listener"]}
            channel.send(near, {**policy_message(policy), **carries}, [listener.fileno()])

    def connect(self) -> tuple[Service, OpenedLauncher]:
        """Be its next service: what that is told, too. The one before goes."""
        if self._latest is not None:
            self._latest.sock.close()
        while True:
            with suppress(Busy):  # the end of the one before is not seen yet
                opened = connect_launcher(self._path)
                for job in opened.jobs:
                    channel.close_all([job.stdout, job.stderr])
                launcher = LauncherProcess(process=self.process, **asdict(opened, recurse=False))
                self._latest = Service(launcher, self._policy)
                return self._latest, opened

    def end(self) -> None:
        """End it, and see that nothing of it is left."""
        self.process.terminate()
        assert self._latest is not None
        self._latest.sock.close()
        assert self._latest.leaves() == 0


@pytest.fixture
def outside(
    make_policy: Callable[..., LauncherPolicy],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[[str], Outside]]:
    """Starts a launcher that outlives its services, by a program."""
    made: list[Outside] = []

    def start(bootstrap: str) -> Outside:
        monkeypatch.setattr(launch, "_BOOTSTRAP", bootstrap)
        made.append(Outside(make_policy()))
        return made[-1]

    yield start
    for each in made:
        each.end()


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Where the program tells that it runs."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        sock.setblocking(False)
        yield sock


def runs_told(listener: socket.socket, least: int = 0) -> int:
    """How many programs have told that they run; waits until at least so many have."""
    count, deadline = 0, time.monotonic() + 20
    while count < least and time.monotonic() < deadline:
        with suppress(BlockingIOError):
            listener.accept()[0].close()
            count += 1
        time.sleep(0.01)
    while True:
        try:
            listener.accept()[0].close()
        except BlockingIOError:
            return count
        count += 1


def waits_below_it(init: int) -> bool:
    """Whether a child of this process waits for an order."""
    return any(name.startswith("memfd:tramp") for name in children_of(init).values())


def has_its_order(launcher: int) -> bool:
    """Whether the launcher has written a child's order, and so has heard of the child."""
    for link in Path(f"/proc/{launcher}/fd").iterdir():
        with suppress(OSError):  # just closed
            if "memfd:order" in os.readlink(link) and link.stat().st_size:
                return True
    return False


def spawn(
    service: Service,
    listener: socket.socket,
    *,
    init: bool = False,
    prepared: bool = True,
    then: str = "exit 5",
    **changes: object,
) -> None:
    """Ask for a start for which nothing but the word to go on is missing.

    Unless it is not even to be `prepared`.
    """
    launcher, port = child_of(service.process.pid), listener.getsockname()[1]
    fields = service.fields("bash", "-c", f"echo > /dev/tcp/127.0.0.1/{port}; {then}")
    spawn = {"id": 101, "op": "spawn", "job": 1, **fields, "init": init, **changes}
    deadline = time.monotonic() + 20

    def wait_for(condition: Callable[[], object]) -> None:
        while prepared and not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    if not init:
        wait_for(lambda: spares_of(launcher))
    channel.send(service.sock, spawn)
    if init:
        wait_for(lambda: any(map(waits_below_it, children_of(launcher))))
    wait_for(lambda: has_its_order(launcher))


def give_up(service: Service, listener: socket.socket, **changes: object) -> list[Message]:
    """Have such a start given up: the replies to both."""
    spawn(service, listener, **changes)  # type: ignore[arg-type]
    channel.send(service.sock, {"id": 102, "op": "give_up", "job": 1})
    replies: dict[object, Message] = {}
    while len(replies) < 2:
        message, descriptors = service.receive()
        channel.close_all(descriptors)
        if message.get("id") is not None:
            replies[message["id"]] = message
    return [replies[101], replies[102]]


def test_program_that_was_told_as_not_executed_never_runs(
    serving: Callable[[str], Service], listener: socket.socket
) -> None:
    started, given_up = give_up(serving("after"), listener)
    assert given_up["ok"] == {"given_up": True}
    assert "its program was not executed" in str(started["error"])
    assert runs_told(listener) == 0


def test_program_that_has_begun_is_not_given_up_and_goes_on(
    serving: Callable[[str], Service], listener: socket.socket
) -> None:
    service = serving("before")
    started, given_up = give_up(service, listener)
    assert given_up["ok"] == {"given_up": False}
    assert "ok" in started
    assert service.exit_of(1)["code"] == 5
    assert runs_told(listener, 1) == 1
    assert "ok" in service.ask("remove", 1)[0]


def test_program_below_an_init_that_may_have_begun_is_told_so(
    serving: Callable[[str], Service], listener: socket.socket
) -> None:
    """The init is stopped, which does not stop the process that executes the program."""
    started, given_up = give_up(serving("after"), listener, init=True)
    assert given_up["ok"] == {"given_up": True}
    error = started["error"]
    assert isinstance(error, dict)
    assert error["errno"] != errno.ECANCELED
    assert "may have begun" in error["detail"]
    assert runs_told(listener, 1) == 1


def test_program_whose_init_was_not_executed_either_is_told_as_not_executed(
    serving: Callable[[str], Service], listener: socket.socket
) -> None:
    started, given_up = give_up(serving("never"), listener, init=True, prepared=False)
    assert given_up["ok"] == {"given_up": True}
    error = started["error"]
    assert isinstance(error, dict)
    assert error["errno"] == errno.ECANCELED
    assert runs_told(listener) == 0


def test_program_that_may_have_begun_is_told_so_also_where_it_took_too_much_memory(
    serving: Callable[[str], Service], listener: socket.socket
) -> None:
    greedy = {"then": "exec tail /dev/zero", "memory_bytes": 64 << 20}
    started, _ = give_up(serving("greedy"), listener, init=True, **greedy)
    assert "may have begun" in str(started["error"])
    assert runs_told(listener, 1) == 1


def test_start_that_may_have_begun_is_not_made_again_by_the_next_service(
    outside: Callable[[str], Outside], listener: socket.socket
) -> None:
    launcher = outside(BEGINS_LATE.replace("MOMENT", "after"))
    service, _ = launcher.connect()
    started, _ = give_up(service, listener, init=True)
    assert "may have begun" in str(started["error"])
    service, opened = launcher.connect()
    assert opened.unstarted == frozenset()
    assert runs_told(listener, 1) == 1


@pytest.mark.parametrize(
    ("moment", "init", "runs"),
    [("after", False, 0), ("after", True, 1), ("before", False, 1), ("before", True, 1)],
)
def test_program_runs_or_is_told_to_the_next_service_as_not_executed(
    outside: Callable[[str], Outside],
    listener: socket.socket,
    moment: str,
    init: bool,
    runs: int,
) -> None:
    """Its service goes in the midst of the start."""
    launcher = outside(BEGINS_LATE.replace("MOMENT", moment))
    service, _ = launcher.connect()
    spawn(service, listener, init=init)
    service, opened = launcher.connect()
    assert runs_told(listener, runs) == runs
    assert opened.unstarted == (frozenset() if runs else {1})
    assert [job.job for job in opened.jobs] == ([1] if moment == "before" else [])
    if moment == "before":
        end = opened.jobs[0].exit
        assert (end.code if end else service.exit_of(1)["code"]) == 5, "it goes on"
        assert "ok" in service.ask("remove", 1)[0]


def test_starts_that_wait_are_refused_together_where_the_first_word_of_it_ends_the_connection(
    outside: Callable[[str], Outside], capfd: pytest.CaptureFixture[str]
) -> None:
    launcher = outside(NO_PLACE)
    service, _ = launcher.connect()
    for job in (1, 2):
        fields = service.fields("true")
        channel.send(service.sock, {"id": 100 + job, "op": "spawn", "job": job, **fields})
    assert channel.receive(service.sock) is None
    service, opened = launcher.connect()
    assert opened.unstarted == {1, 2}
    turns = service.ask("turns", 0)[0]["ok"]
    assert isinstance(turns, dict)
    assert turns["incidents"] == 0, capfd.readouterr().err
