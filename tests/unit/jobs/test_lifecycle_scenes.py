"""Scenes that the state machine of jobs comes to seldom, played by its rules.

Each was chosen since a fault of the code showed there and hardly anywhere else.
"""

import signal
from collections.abc import Callable

import pytest

from jobworker.model.job import JobId
from jobworker.model.lifecycle import State

from .failing_disks import HistoryFault
from .lifecycle_rules import Wanted
from .lifecycle_world import Kill, Mishap
from .test_lifecycle_machine import LifecycleMachine

KILLED = Kill(turns=None, keeps_jobs=True)


def stop_of_a_job_that_waits(machine: LifecycleMachine) -> None:
    for _ in range(3):
        machine.admit(wanted=Wanted())
    machine.stop(5, signal.SIGTERM, None, None)
    assert machine.told.ends[JobId(3)].state is State.STOPPED
    assert machine.program_of(JobId(3)) is None


def stop_of_a_start_that_is_given_up(machine: LifecycleMachine) -> None:
    """Its client has its id, since the job waited first."""
    machine.admit(wanted=Wanted())
    machine.admit(wanted=Wanted())
    machine.admit(wanted=Wanted(starts=("hangs",)))
    machine.exit(0, 0, (0, None, ""), None)
    (job,) = machine.launcher.hanging()
    machine.stop(1, signal.SIGTERM, 2.0, None)
    machine.see_stops()
    assert machine.told.ends[job].state is State.STOPPED


def stop_of_a_start_that_has_success_nevertheless(machine: LifecycleMachine) -> None:
    machine.admit(wanted=Wanted())
    machine.admit(wanted=Wanted())
    machine.admit(wanted=Wanted(starts=("hangs",), on_signal="goes on"))
    machine.exit(0, 0, (0, None, ""), None)
    (job,) = machine.launcher.hanging()
    machine.stop(1, signal.SIGTERM, 2.0, None)
    machine.finish_start(0)
    machine.see_stops()
    assert machine.told.ends[job].state is State.STOPPED


def stop_that_the_launcher_refuses(machine: LifecycleMachine) -> None:
    """The record alone tells the next service of it."""
    machine.admit(wanted=Wanted(on_signal="goes on"))
    machine.stop(1, signal.SIGTERM, 1e6, Mishap(launcher="refuses"))
    machine.nothing_told_is_unsaid()
    machine.hand_over(ends_jobs=False, keeps_jobs=True)


def output_discarded_in_pieces_before_a_kill(machine: LifecycleMachine) -> None:
    """The record knows of the first; the index has at least half."""
    machine.admit(wanted=Wanted(output_bytes=50))
    machine.write(0, 0, [60, 100], Mishap(kill=KILLED))


def output_cut_by_a_full_disk_before_a_kill(machine: LifecycleMachine) -> None:
    """The log must not go on after the gap, though history and index know of none."""
    machine.admit(wanted=Wanted())
    machine.write(0, 0, [10], None)
    machine.write(0, 0, [10], Mishap(history="slow", output="full", kill=KILLED))
    machine.write(0, 0, [10], Mishap())


def time_out_over_two_kills(machine: LifecycleMachine) -> None:
    machine.admit(wanted=Wanted(on_signal="goes on", timeout_seconds=3.0))
    for _ in range(2):
        machine.pass_time(1.5, None)
        machine.kill_at_once(KILLED)
    machine.see_time_outs()


def time_out_of_a_job_that_waited(machine: LifecycleMachine) -> None:
    """It begins with the program."""
    machine.admit(wanted=Wanted())
    machine.admit(wanted=Wanted())
    machine.admit(wanted=Wanted(timeout_seconds=3.0))
    machine.pass_time(2.0, None)
    machine.exit(0, 0, (0, None, ""), None)
    machine.pass_time(2.0, None)
    assert len(machine.launcher.alive()) == 2
    machine.see_time_outs()


def start_of_a_job_that_waited_cut_short_by_a_kill(machine: LifecycleMachine) -> None:
    """Its client has its id, and the launcher knows that its program was not executed."""
    machine.admit(wanted=Wanted())
    machine.admit(wanted=Wanted())
    machine.admit(wanted=Wanted(starts=("hangs",)))
    machine.exit(0, 0, (0, None, ""), None)
    assert machine.launcher.hanging()
    machine.kill_at_once(KILLED)


def stop_of_a_job_that_waits_cut_short_by_a_kill(machine: LifecycleMachine) -> None:
    """Its output is sealed by then, and its end nowhere: it waits again, and runs."""
    for _ in range(3):
        machine.admit(wanted=Wanted())
    machine.stop(5, signal.SIGTERM, None, Mishap(history="slow", kill=KILLED))
    machine.exit(0, 0, (0, None, ""), Mishap())
    machine.pass_time(12.0, None)
    assert [program.job for program in machine.launcher.alive()] == [2, 3]
    machine.write(1, 0, [10], None)


def end_that_only_the_note_of_a_killed_service_has(
    machine: LifecycleMachine, fault: HistoryFault = "locked"
) -> None:
    machine.admit(wanted=Wanted())
    machine.exit(0, 9, (1, None, ""), Mishap(history=fault))
    machine.pass_time(12.0, None)
    assert machine.told.ends
    machine.kill_at_once(Kill(turns=None, keeps_jobs=False))


def end_for_which_no_transaction_can_be_begun(machine: LifecycleMachine) -> None:
    """So what writes to the note, too, never runs."""
    end_that_only_the_note_of_a_killed_service_has(machine, "broken")


def end_that_the_history_takes_later(machine: LifecycleMachine) -> None:
    machine.admit(wanted=Wanted())
    machine.exit(0, 9, (1, None, ""), Mishap(history="locked"))
    machine.pass_time(12.0, None)
    assert machine.told.ends
    machine.mend()
    machine.pass_time(12.0, None)


def end_that_is_being_stored_when_the_service_is_killed(machine: LifecycleMachine) -> None:
    """Nobody may have heard of it: the launcher is gone, too, and the job is lost."""
    machine.admit(wanted=Wanted())
    mishap = Mishap(history="slow", kill=Kill(turns=None, keeps_jobs=False))
    machine.exit(0, 9, (1, None, ""), mishap)


def removal_that_the_launcher_refuses_for_a_while(machine: LifecycleMachine) -> None:
    """The end is on the disk by then, and its execution still has the job."""
    machine.admit(wanted=Wanted())
    machine.exit(0, 9, (0, None, ""), Mishap(launcher="refuses"))
    machine.remove(0, False, None)
    machine.mend()
    machine.pass_time(1.5, None)
    assert machine.told.removed


def removal_that_is_being_stored_when_the_service_is_killed(machine: LifecycleMachine) -> None:
    machine.admit(wanted=Wanted())
    machine.exit(0, 9, (0, None, ""), None)
    machine.remove(0, False, Mishap(history="slow", kill=KILLED))


def id_of_a_removed_job_after_a_kill(machine: LifecycleMachine) -> None:
    machine.admit(wanted=Wanted())
    machine.exit(0, 9, (0, None, ""), None)
    machine.remove(0, False, None)
    assert machine.told.removed
    machine.kill_at_once(KILLED)
    machine.admit(wanted=Wanted())


def removal_that_the_launcher_refuses_until_the_service_ends(machine: LifecycleMachine) -> None:
    """Its client must not hear that the job is gone: the next service finds it in the launcher."""
    machine.admit(wanted=Wanted())
    machine.exit(0, 9, (0, None, ""), Mishap(launcher="refuses"))
    machine.remove(0, False, None)
    assert not machine.told.removed
    machine.hand_over(ends_jobs=False, keeps_jobs=True)


@pytest.mark.parametrize(
    "scene",
    [
        stop_of_a_job_that_waits,
        stop_of_a_start_that_is_given_up,
        stop_of_a_start_that_has_success_nevertheless,
        removal_that_the_launcher_refuses_until_the_service_ends,
        stop_that_the_launcher_refuses,
        output_discarded_in_pieces_before_a_kill,
        output_cut_by_a_full_disk_before_a_kill,
        time_out_over_two_kills,
        time_out_of_a_job_that_waited,
        start_of_a_job_that_waited_cut_short_by_a_kill,
        stop_of_a_job_that_waits_cut_short_by_a_kill,
        end_that_only_the_note_of_a_killed_service_has,
        end_for_which_no_transaction_can_be_begun,
        end_that_the_history_takes_later,
        end_that_is_being_stored_when_the_service_is_killed,
        removal_that_the_launcher_refuses_for_a_while,
        removal_that_is_being_stored_when_the_service_is_killed,
        id_of_a_removed_job_after_a_kill,
    ],
)
def test_nothing_told_is_unsaid(scene: Callable[[LifecycleMachine], None]) -> None:
    machine = LifecycleMachine()
    machine.begin()
    try:
        scene(machine)
        machine.nothing_told_is_unsaid()
    finally:
        machine.teardown()
