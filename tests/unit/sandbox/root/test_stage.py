"""The launcher's own mount namespace, and what every root of a job has."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from jobworker.errors import SandboxError
from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.disk.images import ImageSettings
from jobworker.sandbox.root.stage import (
    LINKS,
    READ_ONLY,
    Stage,
    clone,
    make_skeleton,
    move_to,
    unshare_mounts,
)
from jobworker.sandbox.start.plan import Layer, Order, RootView

from .conftest import Work

MS_SHARED = 1 << 20
HOST = RootView("/dev/null", ("/base",), (Layer("", ("/base/root",)),))
DEBIAN = HOST._replace(mapped=("/base", "/layers/1"))
IMAGES = ImageSettings("/scratch", {}, "", ())
STAGE = Stage(HOST, IMAGES, (), {"debian": DEBIAN}, IMAGES)
ORDER = Order("job", ("true",), {}, "")


def mounts() -> list[list[str]]:
    """The fields of each mount of this process: proc_pid_mountinfo(5)."""
    return [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]


def fault_of(work: Work) -> str:
    try:
        work()
    except OSError as error:
        return os.strerror(error.errno or 0)
    return ""


# --- the namespace ------------------------------------------------------------------------------


def test_namespace_shares_no_mount_with_the_host(apart: Callable[[Work], object]) -> None:
    def kinds() -> list[str]:
        sc.mount(None, "/", None, sc.MS_REC | MS_SHARED)  # as systemd has it
        unshare_mounts()
        return [tag.partition(":")[0] for mount in mounts() for tag in mount[6 : mount.index("-")]]

    assert apart(kinds) == []


def test_copy_of_a_mount_is_read_only_and_has_nothing_below_it(
    apart: Callable[[Work], object], tmp_path: Path
) -> None:
    def look() -> tuple[str, list[str], bool]:
        for name in ("from", "to"):
            (tmp_path / name).mkdir()
        sc.mount("tmpfs", f"{tmp_path}/from", "tmpfs", 0)
        (tmp_path / "from/below").mkdir()
        sc.mount("tmpfs", f"{tmp_path}/from/below", "tmpfs", 0)
        (tmp_path / "from/below/secret").touch()
        tree = clone(f"{tmp_path}/from", READ_ONLY)
        sc.move_mount(tree, f"{tmp_path}/to")
        os.close(tree)
        fault = fault_of((tmp_path / "to/new").touch)
        (tmp_path / "from/new").touch()
        flags = os.statvfs(tmp_path / "to").f_flag
        return fault, sorted(os.listdir(tmp_path / "to/below")), bool(flags & os.ST_NOSUID)

    assert apart(look) == ["Read-only file system", [], True]


def test_stage_has_what_it_was_given_and_nothing_of_the_host(
    apart: Callable[[Work], object], tmp_path: Path
) -> None:
    (tmp_path / "stage").mkdir()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/file").touch()

    def look() -> object:
        kept = clone(str(tmp_path / "kept"), READ_ONLY)
        sc.mount("tmpfs", f"{tmp_path}/kept", "tmpfs", 0)
        move_to(str(tmp_path / "stage"), {"/kept": kept}, ("/base",))
        points = sorted(mount[4] for mount in mounts())
        return sorted(os.listdir("/")), os.listdir("/kept"), points, os.getcwd()

    assert apart(look) == [["base", "kept", "proc"], ["file"], ["/", "/kept", "/proc"], "/"]


def test_directories_of_the_stage_can_be_passed_by_jobs(
    apart: Callable[[Work], object], tmp_path: Path
) -> None:
    def look() -> list[int]:
        os.umask(0o77)
        move_to(str(tmp_path), {}, ("/base",))
        return [stat.S_IMODE(os.stat(path).st_mode) for path in ("/", "/base", "/proc")]

    modes = apart(look)
    assert isinstance(modes, list)
    assert modes[:2] == [0o700, 0o755], "the launcher alone looks around at the top"


# --- every root ---------------------------------------------------------------------------------


def test_root_has_places_to_write_and_to_mount_on(tmp_path: Path) -> None:
    make_skeleton(str(tmp_path), {"bin": "usr/bin", "lib64": "usr/lib64"})
    modes = {
        name: stat.S_IMODE((tmp_path / name).stat().st_mode)
        for name in ("tmp", "var/tmp", "root", "workspace", "dev", "proc", "sys", "run")
    }
    assert modes == {
        **{"tmp": 0o1777, "var/tmp": 0o1777, "root": 0o700, "workspace": 0o755},
        **dict.fromkeys(("dev", "proc", "sys", "run"), 0o755),
    }
    assert os.readlink(tmp_path / "bin") == "usr/bin"
    for name, target in LINKS.items():
        assert os.readlink(tmp_path / name) == target
    assert (tmp_path / "var/lib").is_dir()
    assert not (tmp_path / "usr").exists(), "the host's programs are layers of their own"


# --- what an order asks for ---------------------------------------------------------------------


def test_order_has_the_view_of_its_runtime() -> None:
    assert STAGE.view_for(None) is HOST
    assert STAGE.view_for(ORDER) is HOST
    assert STAGE.view_for(ORDER._replace(runtime="debian")) is DEBIAN


def test_unknown_runtime_is_refused_by_name() -> None:
    with pytest.raises(SandboxError, match="there is no runtime 'alpine'") as caught:
        STAGE.view_for(ORDER._replace(runtime="alpine"))
    assert caught.value.data == {"step": "mount-overlay"}


@pytest.mark.parametrize(
    "order",
    [ORDER._replace(disk_bytes=1 << 24), ORDER._replace(volumes=(("data", "/data"),))],
    ids=["disk", "volume"],
)
def test_disk_is_refused_where_none_can_be_made(order: Order) -> None:
    assert STAGE.view_for(order) is HOST
    stage = STAGE._replace(image_settings=None)
    with pytest.raises(SandboxError, match="cannot bound what the job writes to disk") as caught:
        stage.view_for(order)
    assert caught.value.data == {"step": "mount-disk"}
    assert stage.view_for(ORDER) is HOST


def test_directories_of_an_earlier_launcher_are_found(tmp_path: Path) -> None:
    (tmp_path / "job-1").mkdir()
    view = HOST._replace(scratch=str(tmp_path))
    assert STAGE._replace(view=view).left_over() == [f"{tmp_path}/job-1"]
    assert STAGE._replace(view=HOST._replace(scratch="")).left_over() == []
