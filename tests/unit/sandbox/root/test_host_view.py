"""Which of the host's files a mask hides, and which hosts cannot show jobs a root."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from jobworker.errors import ConfigError, HostUnsupported
from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.disk import images
from jobworker.sandbox.disk.images import DiskSettings, ImageSettings, ImageTemplate
from jobworker.sandbox.root import host_view
from jobworker.sandbox.root.host_trees import not_for_all

from .conftest import Work

MIB = 1 << 20
DISKS = DiskSettings(64 * MIB, 0, reserve=False)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree like the host's, with two files that not every user may read."""
    made = tmp_path / "tree"
    (made / "open/below").mkdir(parents=True)
    (made / "open/below").chmod(0o751)
    (made / "open").chmod(0o2755)
    for name, mode in {"public": 0o644, "secret": 0o600}.items():
        for path in (made / name, made / "open/below" / name):
            path.write_text(name)
            path.chmod(mode)
    return made


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a whiteout")
def test_mask_has_a_whiteout_for_each_hidden_name_and_the_modes_of_the_tree(
    tree: Path, tmp_path: Path
) -> None:
    os.chown(tree / "open", 54321, 54322)
    mask = Path(host_view._mask(f"{tmp_path}/mask", str(tree), ["secret", "open/below/secret"]))
    for name in ("secret", "open/below/secret"):
        status = (mask / name).lstat()
        assert stat.S_ISCHR(status.st_mode)
        assert status.st_rdev == 0
    for name in ("", "open", "open/below"):
        like, made = (tree / name).stat(), (mask / name).stat()
        assert (made.st_mode, made.st_uid, made.st_gid) == (like.st_mode, like.st_uid, like.st_gid)
    assert sorted(os.listdir(mask)) == ["open", "secret"], "nothing else"


def test_kernel_shows_the_tree_without_what_is_hidden(
    apart: Callable[[Work], object], tree: Path, tmp_path: Path
) -> None:
    def look() -> list[str]:
        (tmp_path / "at").mkdir()
        sc.mount("tmpfs", str(tmp_path / "at"), "tmpfs", 0)
        mask = host_view._mask(f"{tmp_path}/at/mask", str(tree), not_for_all(str(tree)))
        (tmp_path / "at/root").mkdir()
        sc.mount("overlay", f"{tmp_path}/at/root", "overlay", 0, f"lowerdir={mask}:{tree}")
        root = tmp_path / "at/root"
        return sorted(str(path.relative_to(root)) for path in root.rglob("*"))

    (tree / "open/below").chmod(0o755)
    if "overlay" not in Path("/proc/filesystems").read_text():
        pytest.skip("the kernel has no overlay file system")
    assert apart(look) == ["open", "open/below", "open/below/public", "public"]


def test_file_system_whose_ids_cannot_be_mapped_is_refused_by_its_name(
    apart: Callable[[Work], object],
) -> None:
    def attempt() -> list[str]:
        try:
            host_view._try_mapping({"/proc": "/usr/local"})
        except HostUnsupported as error:
            return [error.message, error.remedy]
        return []

    told = apart(attempt)
    assert isinstance(told, list)
    assert told[0].startswith("cannot show jobs /usr/local with ids of their own: ")
    assert "sandbox.programs" in told[1]


def test_kernel_without_user_namespaces_is_told_by_the_step_that_needs_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(host_view, "make_user_namespace", refuse)
    host_view._try_mapping({"/proc": "/usr/local"})


@pytest.mark.parametrize(
    ("disk_mib", "code", "remedy"),
    [
        (64, errno.ENOSPC, "make room where worker.state_dir is: 128 MB at least"),
        (
            512,
            errno.ENOSPC,
            "make room where worker.state_dir is: 512 MB at least, or lower sandbox.disk_limit",
        ),
        (64, errno.EFBIG, "raise the limit on the size of files (LimitFSIZE=, ulimit -f)"),
        (
            64,
            errno.ENOENT,
            "install e2fsprogs, and keep worker.state_dir on a local file system with room",
        ),
    ],
)
def test_disks_that_cannot_be_made_are_told_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, disk_mib: int, code: int, remedy: str
) -> None:
    def refuse(settings: ImageSettings, size: int) -> ImageTemplate:
        raise OSError(code, os.strerror(code), "/place")

    monkeypatch.setattr(images, "make_template", refuse)
    with pytest.raises(HostUnsupported, match=r"cannot make disks for jobs: .*/place") as caught:
        host_view._blanks("/scratch", disk_mib * MIB)
    assert caught.value.remedy == remedy


def test_disks_of_both_sizes_are_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(settings: ImageSettings, size: int) -> ImageTemplate:
        assert settings.directory == "/scratch"
        return ImageTemplate(size, ())

    monkeypatch.setattr(images, "make_template", make)
    blanks = host_view._blanks("/scratch", 64 * MIB)
    assert {size: template.size for size, template in blanks.items()} == {
        size: size for size in (64 * MIB, 128 * MIB)
    }


def enter(programs: list[str], runtimes: dict[str, str]) -> None:
    host_view.enter("/stage", "/scratch", "/volumes", programs, [], DISKS, runtimes)


def test_runtime_that_is_none_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    before = os.readlink("/proc/self/ns/mnt")
    with pytest.raises(ConfigError, match=r"cannot use the runtime debian at .*: it is no root"):
        enter(["/usr"], {"debian": str(tmp_path)})
    assert os.readlink("/proc/self/ns/mnt") == before


def test_kernels_refusal_is_told_with_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> object:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/usr/closed")

    monkeypatch.setattr(host_view, "program_trees", refuse)
    expected = r"cannot assemble the root for jobs: Permission denied \(/usr/closed\)"
    with pytest.raises(HostUnsupported, match=expected) as caught:
        enter(["/usr"], {})
    assert "as root on the host itself" in caught.value.remedy


def test_tree_that_cannot_be_searched_is_told_with_its_setting(tmp_path: Path) -> None:
    """Such as one of the kernel's, to which a link in sandbox.programs leads."""
    gone = f"{tmp_path}/gone"
    with pytest.raises(HostUnsupported, match=f"cannot show jobs {gone}: .*No such file") as told:
        host_view._searched(gone)
    assert told.value.remedy == "take it out of sandbox.programs"


def test_names_that_cannot_be_hidden_are_told_with_their_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """/sys has more of them than the skeleton's disk has room for."""

    def refuse(place: str, tree: str, names: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(host_view, "_mask", refuse)
    expected = "cannot show jobs /many: cannot hide the 2 names .*: No space left on device"
    with pytest.raises(HostUnsupported, match=expected) as told:
        host_view._layer("/base", 0, "/many", ["a", "b"])
    assert told.value.remedy == "take it out of sandbox.programs"
