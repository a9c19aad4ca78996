"""What the launcher knows of a start that it holds, and that the start goes on afterwards."""

import os

from jobworker.sandbox.fork_server import NAME
from jobworker.sandbox.launcher import held_starts
from jobworker.sandbox.launcher.child import Child

from .conftest import StartChild

AS_FORK_SERVER = f'printf {NAME} >"/proc/$$/comm"; echo; read x'


def wait_for(child: Child, what: int) -> None:
    os.waitid(os.P_PIDFD, child.pidfd, what)


def test_child_that_is_held_is_stopped_until_it_goes_on(start_child: StartChild) -> None:
    child = start_child()
    assert held_starts.hold(child)
    wait_for(child, os.WSTOPPED)
    held_starts.go_on(child)
    wait_for(child, os.WCONTINUED)


def test_init_that_was_not_executed_is_held(start_child: StartChild) -> None:
    child = start_child("sh", "-c", AS_FORK_SERVER, says=True)
    child.report = 0
    assert held_starts.hold(child)


def test_init_that_was_executed_is_not_held_for_certain(start_child: StartChild) -> None:
    """A process below it may execute the program, and the signal does not reach that process."""
    child = start_child()
    child.report = 0
    assert not held_starts.hold(child)
    wait_for(child, os.WSTOPPED)


def test_init_whose_name_cannot_be_read_is_not_held_for_certain(start_child: StartChild) -> None:
    child = start_child("true")
    wait_for(child, os.WEXITED)
    child.report = 0
    assert not held_starts.hold(child)


def test_child_that_has_ended_is_held_and_goes_on_without_a_fault(start_child: StartChild) -> None:
    child = start_child("true")
    wait_for(child, os.WEXITED)
    assert held_starts.hold(child)
    held_starts.go_on(child)
