"""The host's directories in a job's root: which they are, and what in them is hidden."""

import os
from pathlib import Path

import pytest

from jobworker.errors import HostUnsupported
from jobworker.sandbox.root.host_trees import MERGED, not_for_all, program_trees, with_mounts_below


def test_program_directories_that_exist_are_shown(tmp_path: Path) -> None:
    (tmp_path / "programs").mkdir()
    (tmp_path / "file").write_text("x")
    wanted = [f"{tmp_path}/{name}" for name in ("programs", "absent", "file")]
    trees, _ = program_trees(wanted)
    assert trees[0] == f"{tmp_path}/programs"
    assert not {wanted[1], wanted[2]} & set(trees)


def test_top_level_links_of_a_merged_host_stay_links_and_directories_come_along() -> None:
    trees, links = program_trees(["/usr"])
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        path = Path("/", name)
        if path.is_symlink():
            assert links[name] == os.readlink(path)
            assert str(path) not in trees
        else:
            assert name not in links
            assert (str(path) in trees) == path.is_dir()
    assert trees[0] == "/usr"
    assert len(set(trees)) == len(trees)


@pytest.mark.skipif(
    any(Path("/", name).is_dir() and not Path("/", name).is_symlink() for name in MERGED),
    reason="needs a host with a merged /usr",
)
def test_no_program_directory_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HostUnsupported, match=r"none of .*/absent is a directory") as caught:
        program_trees([f"{tmp_path}/absent"])
    assert "sandbox.programs" in caught.value.remedy
    with pytest.raises(HostUnsupported, match="none are named"):
        program_trees([])


# --- mounts below ---------------------------------------------------------------------------


def test_mount_below_a_tree_is_a_tree_of_its_own(tmp_path: Path) -> None:
    for name in ("usr/local/a b", "usrlocal", "usr/share"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "usr/file").write_text("x")

    def line(point: str) -> str:
        return f"36 35 98:0 / {tmp_path}/{point} rw,noatime - ext4 /dev/root rw\n"

    points = ("usr", r"usr/local/a\040b", "usrlocal", "usr/file", "usr/gone")
    found = with_mounts_below([f"{tmp_path}/usr"], "".join(map(line, points)))
    assert found == [f"{tmp_path}/usr", f"{tmp_path}/usr/local/a b"]


# --- what is hidden -------------------------------------------------------------------------


def test_what_not_everyone_may_read_is_found(tmp_path: Path) -> None:
    for name, mode in {
        "open": 0o755,
        "closed": 0o750,
        "nolist": 0o711,
        "open/below": 0o755,
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(mode)
    for name, mode in {
        "secret": 0o600,
        "group": 0o640,
        "program": 0o755,
        "no-read": 0o711,
        "open/below/secret": 0o600,
        "open/below/public": 0o644,
        "closed/file": 0o644,
    }.items():
        (tmp_path / name).write_text("x")
        (tmp_path / name).chmod(mode)
    (tmp_path / "link").symlink_to("/etc/shadow")
    expected = {"closed", "nolist", "secret", "group", "no-read", "open/below/secret"}
    assert set(not_for_all(str(tmp_path))) == expected


def test_link_to_a_directory_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(".")
    (tmp_path / "fifo").mkdir()
    os.mkfifo(tmp_path / "fifo/pipe", 0o600)
    assert not_for_all(str(tmp_path)) == ["fifo/pipe"]
