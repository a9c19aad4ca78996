"""The plan: the order that makes a job safe holds for whatever is asked for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker.sandbox.protocol.requests import NETWORKS
from jobworker.sandbox.start import plan
from jobworker.sandbox.start import steps as s
from jobworker.sandbox.start.plan import (
    Layer,
    Order,
    OwnNetwork,
    RootView,
    Sizes,
    Slot,
    finish,
    prepare,
)

from ...strategies import examples, texts, variables

ROOT = "/jobs-root"
MOUNTS = (
    *(s.MountTmpfs, s.MountDisk, s.MountOverlay, s.MountDevices, s.MountDevpts, s.MountProc),
    *(s.MapIds, s.BindScratch, s.MaskPath, s.ReadOnlyPath),
    s.KeepOwnDescriptors,  # it opens a /dev/null of the launcher's
)
VIEW = RootView(
    "/dev/null",
    ("/base", "/layers/0"),
    (Layer("", ("/base/root",)), Layer("/usr", ("/base/mask", "/layers/0"))),
    volumes=(
        ("cache", "/volumes/cache.img", "/volumes/cache"),
        ("srv", "/volumes/srv.img", "/srv"),
    ),
)
READ_ONLY_VIEW = RootView(f"{ROOT}/dev/null", scratch="/scratch")
SIZES = Sizes(disk=54_321, tmpfs=12_345, terminals=7)

CHANGES_OF_USER = (s.EnterUserNamespace, s.SetUser)

slots = st.builds(Slot, name=texts, first_uid=st.integers(100_000, 1 << 31))
orders = st.builds(
    Order,
    hostname=texts,
    arguments=st.lists(texts, min_size=1, max_size=4).map(tuple),
    environment=variables,
    workdir=st.just("") | texts.map(lambda text: f"/{text}"),
    network=st.sampled_from(NETWORKS),
    uid=st.integers(0, 65_535),
    gid=st.integers(0, 65_535),
    init=st.booleans(),
)


def whole(slot: Slot, order: Order) -> list[s.Step]:
    own = None
    if order.network != "host":
        own = OwnNetwork(order.hostname, has_gateway=order.network == "private")
    return [*prepare(ROOT, VIEW, slot, SIZES, order, own), *finish(order)]


def place(steps: list[s.Step], kind: type) -> int:
    """Where the one step of a kind stands."""
    (index,) = [index for index, step in enumerate(steps) if type(step) is kind]
    return index


@examples(max_examples=100)
@given(slots, orders)
def test_scope_is_entered_first_and_the_program_executed_last(slot: Slot, order: Order) -> None:
    steps = whole(slot, order)
    assert place(steps, s.AttachScope) == 0
    assert place(steps, s.Execute) == len(steps) - 1


@examples(max_examples=100)
@given(slots, orders)
def test_root_is_left_once_it_is_complete(slot: Slot, order: Order) -> None:
    steps = whole(slot, order)
    pivot = place(steps, s.PivotRoot)
    mounts = [index for index, step in enumerate(steps) if isinstance(step, MOUNTS)]
    assert max(mounts) < pivot
    assert place(steps, s.UnshareCgroupNamespace) < place(steps, s.MountProc)
    # Nothing behind the pivot speaks of the tree as the launcher sees it.
    for step in steps[pivot + 1 : -1]:
        assert not any(isinstance(word, str) and word.startswith(ROOT) for word in step) or (
            type(step) in (s.ChangeDirectory, s.WriteNames)  # the client's own words
        )


@examples(max_examples=100)
@given(slots, orders)
def test_rights_are_given_up_before_the_program_runs(slot: Slot, order: Order) -> None:
    steps = whole(slot, order)
    in_order = [
        *(s.PivotRoot, s.EnterUserNamespace, s.DropCapabilities),
        *(s.ForbidNewPrivileges, s.CloseDescriptors, s.FilterSystemCalls, s.Execute),
    ]
    places = [place(steps, kind) for kind in in_order]
    assert places == sorted(places)
    # Raising a limit needs rights over the host, which go with the user namespace.
    limits = [index for index, step in enumerate(steps) if isinstance(step, s.SetResourceLimit)]
    assert max(limits) < place(steps, s.EnterUserNamespace)
    # setuid(2) clears the parent-death signal: prctl(2), PR_SET_PDEATHSIG.
    last_change = max(i for i, step in enumerate(steps) if isinstance(step, CHANGES_OF_USER))
    assert any(isinstance(step, s.DieWithLauncher) for step in steps[last_change:])


def test_spare_waits_with_all_its_rights_given_up() -> None:
    finishing = [type(step) for step in finish(Order("j", ("a",), {}, ""))]
    assert finishing == [s.ChangeDirectory, s.Execute]


@examples(max_examples=100)
@given(slots, orders)
def test_descriptors_are_closed_before_the_directory_is_entered(slot: Slot, order: Order) -> None:
    steps = whole(slot, order)
    closed, directory = place(steps, s.CloseDescriptors), place(steps, s.ChangeDirectory)
    # Else the directory could be one of them, through /proc/self/fd (CVE-2024-21626).
    assert place(steps, s.EnterUserNamespace) < closed < directory < place(steps, s.Execute)


@examples(max_examples=100)
@given(orders)
def test_environment_is_the_sandbox_and_the_order_and_nothing_else(order: Order) -> None:
    environment = dict(finish(order)[-1].environment)
    own = dict(plan.ENVIRONMENT)
    if order.uid:
        del own["USER"], own["LOGNAME"]
        own["HOME"] = plan.WORKSPACE
    assert environment == {**own, **order.environment}


@examples(max_examples=100)
@given(slots, orders)
def test_network_and_user_are_changed_where_the_right_to_is_still_there(
    slot: Slot, order: Order
) -> None:
    steps = whole(slot, order)
    user_namespace = place(steps, s.EnterUserNamespace)
    networks = (s.UnshareNetwork, s.EnterNetwork)
    spare = prepare(ROOT, VIEW, slot, SIZES)
    assert not any(isinstance(step, networks) for step in spare)
    if order.network != "host":
        # A network namespace belongs to the user namespace that makes it: never to the job's.
        kind = s.EnterNetwork if order.network == "private" else s.UnshareNetwork
        assert place(steps, s.AttachScope) < place(steps, kind) < user_namespace
        assert place(steps, s.PivotRoot) < place(steps, s.WriteNames) < user_namespace
    else:
        assert not [step for step in steps if isinstance(step, (*networks, s.WriteNames))]
    if order.uid or order.gid:
        # What is kept of the capabilities is over the job's own namespace.
        assert place(steps, s.DropCapabilities) < place(steps, s.SetUser)


def test_nothing_of_our_own_environment_reaches_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY", "secret-canary")
    monkeypatch.setenv("PATH", "/secret-canary")
    monkeypatch.setenv("LD_PRELOAD", "secret-canary.so")
    order = Order("job-1", ("env",), {}, "")
    steps = whole(Slot("job-1", 100_000), order)
    assert "canary" not in repr(steps)
    assert set(dict(steps[-1].environment)) == set(plan.ENVIRONMENT)  # type: ignore[union-attr]


@examples(max_examples=50)
@given(slots, orders)
def test_same_input_gives_the_same_steps(slot: Slot, order: Order) -> None:
    assert whole(slot, order) == whole(slot, order)


def test_program_gets_its_arguments_and_directory_as_asked() -> None:
    steps = finish(Order("job-1", ("sh", "-c", ""), {}, "/tmp"))
    assert steps[-1].arguments == ("sh", "-c", "")
    assert s.ChangeDirectory("/tmp") in steps
    assert s.ChangeDirectory(plan.WORKSPACE) in finish(Order("job-1", ("sh",), {}, ""))


def test_everything_writable_belongs_to_the_job_and_is_bounded() -> None:
    steps = prepare(ROOT, VIEW, Slot("job-1", 100_000), SIZES)
    for step in steps:
        if isinstance(step, s.MountTmpfs):
            assert (step.owner, step.size_bytes) == (100_000, 12_345)
        if isinstance(step, s.MountDisk):
            assert (step.path, step.size_bytes) == (plan.DISK, 54_321)
        if isinstance(step, s.MountOverlay):
            assert step.owner == 100_000
            assert step.disk.startswith(f"{plan.DISK}/")
    disks = [step.disk for step in steps if isinstance(step, s.MountOverlay)]
    assert len(set(disks)) == len(disks) == 2


def test_layers_have_the_ids_of_the_job_before_they_are_shown() -> None:
    steps = list(prepare(ROOT, VIEW, Slot("job-1", 100_000), SIZES))
    overlays = [index for index, step in enumerate(steps) if isinstance(step, s.MountOverlay)]
    mapped = [step.path for step in steps[: min(overlays)] if isinstance(step, s.MapIds)]
    for step in steps:
        if isinstance(step, s.MountOverlay):
            for lower in step.lower:
                assert any(f"{lower}/".startswith(f"{path}/") for path in mapped)
    assert [steps[index].path for index in overlays] == [ROOT, f"{ROOT}/usr"]  # type: ignore[union-attr]


def test_volumes_are_placed_in_the_finished_root_while_there_are_rights() -> None:
    steps = list(prepare(ROOT, VIEW, Slot("job-1", 100_000), SIZES))
    opened = [step for step in steps if isinstance(step, s.OpenVolume)]
    placed = [step for step in steps if isinstance(step, s.PlaceVolume)]
    assert [step.image for step in opened] == ["/volumes/cache.img", "/volumes/srv.img"]
    assert [step.path for step in placed] == ["/volumes/cache", "/srv"]
    assert [step.descriptor for step in opened] == [step.descriptor for step in placed]
    pivot, user = place(steps, s.PivotRoot), place(steps, s.EnterUserNamespace)
    assert max(map(steps.index, opened)) < pivot < min(map(steps.index, placed))
    assert max(map(steps.index, placed)) < user < place(steps, s.CloseDescriptors)


def test_read_only_root_has_directories_of_the_jobs_own() -> None:
    steps = prepare(ROOT, READ_ONLY_VIEW, Slot("job-1", 100_000), SIZES)
    for step in steps:
        assert not isinstance(step, s.MountOverlay | s.MountDisk | s.MapIds)
        if isinstance(step, s.BindScratch):
            assert step.source.startswith("/scratch/job-1/")
        if isinstance(step, s.MakeScratch):
            assert (step.directory, step.owner) == ("/scratch/job-1", 100_000)
    binds = {step.path for step in steps if isinstance(step, s.BindScratch)}
    assert binds == {f"{ROOT}/tmp", f"{ROOT}/var/tmp", f"{ROOT}/root", f"{ROOT}/workspace"}


def test_what_tells_of_the_host_or_changes_it_is_covered() -> None:
    steps = prepare(ROOT, VIEW, Slot("job-1", 100_000), SIZES)
    for path in ("kcore", "keys", "kmsg", "kallsyms", "sysrq-trigger", "timer_list", "acpi"):
        assert s.MaskPath(f"{ROOT}/proc/{path}") in steps
    for path in ("sys", "bus", "fs", "irq"):
        assert s.ReadOnlyPath(f"{ROOT}/proc/{path}") in steps
    proc = list(steps).index(s.MountProc(f"{ROOT}/proc"))
    for index, step in enumerate(steps):
        assert not isinstance(step, s.MaskPath | s.ReadOnlyPath) or index > proc


def test_capabilities_that_reach_beyond_the_job_are_not_kept() -> None:
    # capabilities(7): SYS_MODULE 16, SYS_RAWIO 17, SYS_PTRACE 19, SYS_ADMIN 21, SYS_BOOT 22,
    # SYS_TIME 25, MKNOD 27, NET_ADMIN 12, NET_RAW 13, SYSLOG 34, BPF 39, PERFMON 38, DAC_READ 2
    reaching = {2, 12, 13, 16, 17, 19, 21, 22, 25, 27, 34, 38, 39}
    steps = prepare(ROOT, VIEW, Slot("job-1", 100_000), SIZES)
    (drop,) = [step for step in steps if "keep" in dir(step)]
    assert drop == s.DropCapabilities(plan.KEPT_CAPABILITIES)
    assert not plan.KEPT_CAPABILITIES & reaching
