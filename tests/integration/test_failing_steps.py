"""Each step of a start fails in its turn, in the real child of a real launcher: nothing stays.

A child's number says which kind of step is broken for it, and whether it fails before or after it
has done its work. So what is half-made is as it would be: groups entered, mounts made, rights
given up, the filter loaded. The error names the step and the reason, and the launcher is left as
if nobody had asked.
"""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobworker.sandbox.cgroup.files import groups_called
from jobworker.sandbox.protocol.policy import LauncherPolicy
from jobworker.sandbox.service import launch
from jobworker.sandbox.service.launch import start_launcher
from jobworker.sandbox.start import steps
from jobworker.sandbox.start.apply import _APPLY
from jobworker.sandbox.start.steps import name_of

from .conftest import child_of, children_of, settled, until
from .test_launcher import Service, make_policy

__all__ = ["make_policy"]

BREAK = """
import errno
from jobworker.sandbox.launcher import zombies
from jobworker.sandbox.start import apply
zombies.COLLECT_SECONDS = 0.02  # else a second would pass after each step
def breaking(turn, real):
    def broken(step, means):
        number = int(means.scope.name.rsplit("-", 1)[1]) - 1
        if number // 2 == turn and number % 2 == 0:
            raise OSError(errno.EXDEV, "broken before")
        real(step, means)
        if number // 2 == turn:
            raise OSError(errno.EXDEV, "broken after")
    return broken
for turn, (kind, real) in enumerate(list(apply._APPLY.items())):
    apply._APPLY[kind] = breaking(turn, real)
"""
KINDS = list(_APPLY)
IN_EVERY_START = {
    *(steps.AttachScope, steps.KeepOwnDescriptors, steps.UnshareCgroupNamespace, steps.NewSession),
    *(steps.NewKeyring, steps.MountTmpfs, steps.MountDevpts, steps.MountProc, steps.MaskPath),
    *(steps.ReadOnlyPath, steps.PivotRoot, steps.SetResourceLimit, steps.EnterUserNamespace),
    *(steps.DropCapabilities, steps.ForbidNewPrivileges, steps.DieWithLauncher),
    *(steps.ResetSignals, steps.CloseDescriptors, steps.FilterSystemCalls),
    steps.BecomeTrampoline,
}
"""Others belong to what a job asks for, or to what a kernel has."""


@pytest.fixture
def service(
    make_policy: Callable[..., LauncherPolicy],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Service]:
    """A launcher without spares, whose every child fails at its own step."""
    policy = make_policy()._replace(max_jobs=1, spares=0)
    path, call = launch._BOOTSTRAP.split("; ", 2)[:2], "main(int(sys.argv[2]))"
    importing = "from jobworker.sandbox.launcher.main import main"
    monkeypatch.setattr(launch, "_BOOTSTRAP", "\n".join([*path, BREAK, importing, call]))
    made = Service(start_launcher(policy), policy)
    yield made
    made.sock.close()
    assert made.leaves() == 0


class State:
    """What the launcher has of descriptors, mounts, children, groups, files and loop devices."""

    def __init__(self, service: Service) -> None:
        pid = child_of(service.process.pid)
        self.descriptors = sorted(os.listdir(f"/proc/{pid}/fd"))
        self.mounts = Path(f"/proc/{pid}/mountinfo").read_text()
        self.children = children_of(pid)
        self.groups = [
            below for group in groups_called(service.policy.instance) for below in _below(group)
        ]
        self.files = sorted(os.listdir(service.policy.scratch))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, State) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]


def _below(group: str) -> list[str]:
    return [str(path) for path in Path(group).iterdir() if path.is_dir()]


async def test_every_step_fails_by_name_and_leaves_nothing(service: Service) -> None:
    before = settled(lambda: State(service))
    unmet: set[tuple[type, str]] = set()
    for job, (kind, moment) in enumerate(
        ((kind, moment) for kind in KINDS for moment in ("before", "after")), start=1
    ):
        reply, descriptors = service.spawn(job, "true", network="none", uid=7)
        if "ok" in reply:
            unmet.add((kind, moment))
            for descriptor in descriptors:
                os.close(descriptor)
            service.exit_of(job)
            service.ask("remove", job)
        else:
            error = reply["error"]
            assert isinstance(error, dict)
            told = (error["step"], error["errno"])
            assert told == (name_of(kind), errno.EXDEV), error
        await until(lambda: State(service) == before)
    met = set(KINDS) - {kind for kind, moment in unmet if moment == "before"}
    assert met >= IN_EVERY_START
    assert {(kind, "after") for kind in met} & unmet == {(steps.BecomeTrampoline, "after")}


async def test_launcher_without_a_broken_step_left_runs_jobs(service: Service) -> None:
    """The range of ids, of which there is one here, was given back each time."""
    for job in range(1, 2 * len(KINDS) + 1):
        if "ok" in service.spawn(job, "true")[0]:
            service.exit_of(job)
            service.ask("remove", job)
    assert "ok" in service.spawn(1000, "true")[0]
    assert service.exit_of(1000)["code"] == 0
