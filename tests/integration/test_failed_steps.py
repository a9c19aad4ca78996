"""Each step of a start made to fail in its turn: named, and nothing half-made stays behind."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobworker.errors import HostUnsupported
from jobworker.sandbox import channel
from jobworker.sandbox.cgroup.files import groups_called
from jobworker.sandbox.protocol.policy import LauncherPolicy
from jobworker.sandbox.service import launch
from jobworker.sandbox.service.launch import start_launcher

from .conftest import child_of, disks_in
from .test_launcher import Service, make_policy

__all__ = ["make_policy"]

FAILING = """
import sys; sys.path.insert(0, sys.argv[1])
from jobworker.sandbox.launcher import zombies
from jobworker.sandbox.start import apply, child, steps
zombies.COLLECT_SECONDS = 0.02  # else a second would pass after each step
real = apply.apply
def failing(prepare, means):
    try:
        name = open("/volumes/fails").read()
    except OSError:
        name = ""
    def fail(step, means):
        raise OSError(5, "Input/output error", "on purpose")
    for kind in apply._APPLY:
        if steps.name_of(kind) == name:
            apply._APPLY[kind] = fail
    real(prepare, means)
child.apply = failing
from jobworker.sandbox.launcher.main import main; main(int(sys.argv[2]))
"""
"""A launcher whose jobs fail at the step that a file names."""


@pytest.fixture
def service(
    make_policy: Callable[..., LauncherPolicy], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Service]:
    monkeypatch.setattr(launch, "_BOOTSTRAP", FAILING)
    policy = make_policy()._replace(spares=0)
    made = Service(start_launcher(policy), policy)
    yield made
    made.sock.close()
    assert made.leaves() == 0


def standing(service: Service) -> dict[str, object]:
    """All that a start makes, as it is now."""
    launcher = child_of(service.process.pid)
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    own = [os.listdir(group) for group in groups_called(service.policy.instance)]
    return {
        "mounts": len(Path(f"/proc/{launcher}/mountinfo").read_text().splitlines()),
        "descriptors": len(os.listdir(f"/proc/{launcher}/fd")),
        "disks": len(disks_in(Path(service.policy.scratch))),
        "children": len(children),
        "scopes": sorted(name for names in own for name in names if name.startswith("job-")),
        "files": os.listdir(service.policy.scratch),
    }


def settled(service: Service, wanted: dict[str, object] | None = None) -> dict[str, object]:
    """The same, once no process that clears away is left; at best, once it is `wanted`."""
    same, last, deadline = 0, dict[str, object](), time.monotonic() + 10
    while True:
        service.ask("volume.list", 1)  # a turn of the launcher's loop
        now = standing(service)
        # Two are left: the fork server, and the process that sets host names.
        same = same + 1 if now == last and now["children"] == 2 else 0
        last = now
        if now == wanted or time.monotonic() > deadline or (wanted is None and same == 10):
            return now
        time.sleep(0.01)  # the fork server has calls that were sent before


def test_step_that_fails_is_named_and_leaves_nothing(service: Service) -> None:
    volume = {"name": "cache", "size_bytes": 16 << 20, "thin": False}
    assert "ok" in service.ask("volume.create", 1, **volume)[0]
    asked: dict[str, object] = {
        "network": "none",
        "uid": 1000,
        "gid": 1000,
        "volumes": [["cache", "/volumes/cache"]],
        "disk_bytes": 20 << 20,
    }
    reply, descriptors = service.spawn(1, "true", **asked)
    assert "ok" in reply, "the control: without a fault it starts"
    channel.close_all(descriptors)
    service.exit_of(1)
    service.ask("remove", 1)
    before = settled(service)
    fields = {**service.fields("true"), **asked}
    plan = service.ask("plan", 1, **fields)[0]["ok"]
    assert isinstance(plan, dict)
    names = list(dict.fromkeys(name for name, _, _ in plan["steps"]))
    names = names[: names.index("filter-system-calls")]  # the rest is done by the trampoline
    assert {"map-ids", "mount-disk", "mount-overlay", "open-volume", "place-volume"} <= set(names)
    file = Path(service.policy.volumes) / "fails"
    for job, name in enumerate(names, 2):
        file.write_text(name)
        reply, _ = service.spawn(job, "true", **asked)
        error = reply["error"]
        assert isinstance(error, dict), name
        assert (error["step"], error["errno"], error["detail"]) == (name, 5, "on purpose")
        assert settled(service, before) == before, name
    file.unlink()
    reply, descriptors = service.spawn(1000, "true", **asked)
    assert "ok" in reply
    channel.close_all(descriptors)


@pytest.mark.parametrize("missing", ["loop-control", "mke2fs", "scratch"])
def test_launcher_that_cannot_make_disks_says_so(
    make_policy: Callable[..., LauncherPolicy], monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    """Refused by name, at the start; never a service whose jobs are bounded by nothing."""
    spoil = {
        "loop-control": "d.attach = lambda *a, **k: d.os.open('/dev/nosuch', 0)",
        "mke2fs": "d._MKE2FS = 'nosuch-mke2fs'",
        "scratch": "d.os.fstatvfs = lambda f: d.os.statvfs_result([4096] * 2 + [0] * 8)",
    }[missing]
    bootstrap = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from jobworker.sandbox.disk import images as d\n"
        f"{spoil}\nfrom jobworker.sandbox.launcher.main import main; main(int(sys.argv[2]))\n"
    )
    monkeypatch.setattr(launch, "_BOOTSTRAP", bootstrap)
    policy = make_policy()
    words = {
        "loop-control": r"cannot .*: No such file or directory \(/dev/nosuch\)",
        "mke2fs": r"cannot make disks for jobs: No such file or directory \(mke2fs \(e2fsprogs\)\)",
        "scratch": "cannot make disks for jobs: No space left on device",
    }[missing]
    with pytest.raises(HostUnsupported, match=words) as refusal:
        start_launcher(policy)
    if missing == "scratch":
        assert "make room where worker.state_dir is: " in refusal.value.remedy
        assert "e2fsprogs" not in refusal.value.remedy
    assert groups_called(policy.instance) == []
    assert disks_in(Path(policy.scratch)) == []
    assert os.listdir(policy.scratch) == []
