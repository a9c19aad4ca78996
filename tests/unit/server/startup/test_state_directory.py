"""The state directory: who owns its parts, which links it refuses, and its two locks."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from jobworker.errors import ConfigError
from jobworker.server.startup import state_directory
from jobworker.server.startup.state_directory import (
    holds,
    lock_for_launcher,
    lock_for_service,
    make_service_directory,
    make_state_directory,
)

USER, OTHER = 65_533, 65_534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def state(tmp_path: Path) -> Path:
    made = tmp_path / "state"
    make_state_directory(made)
    return made


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- its layout -----------------------------------------------------------------------------


def test_missing_parts_are_made_for_their_owner_alone(tmp_path: Path) -> None:
    state = tmp_path / "missing" / "state"
    make_state_directory(state)
    assert mode_of(state) == (0o700 if os.geteuid() else 0o755)
    assert sorted(os.listdir(state)) == ["scratch", "stage", "volumes"]
    assert {mode_of(each) for each in state.iterdir()} == {0o700}


def test_what_is_there_stays(state: Path) -> None:
    (state / "volumes" / "disk").touch()
    make_state_directory(state)
    assert holds(state, "volumes/disk")


def test_missing_state_holds_nothing(tmp_path: Path, state: Path) -> None:
    assert not holds(tmp_path / "missing")
    assert not holds(tmp_path / "missing", "lock")
    assert holds(state)
    assert holds(state, "stage")
    assert not holds(state, "lock")


@pytest.mark.parametrize("mode", [0o775, 0o757])
def test_directory_in_which_others_may_write_is_refused(state: Path, mode: int) -> None:
    state.chmod(mode)
    with pytest.raises(ConfigError, match=r"others than user \d+ may write to it") as refused:
        make_state_directory(state)
    assert "chmod 755" in refused.value.remedy


@as_root
def test_directory_of_another_user_is_refused(state: Path) -> None:
    os.chown(state, USER, USER)
    with pytest.raises(ConfigError, match="others than user 0 may write to it") as refused:
        make_state_directory(state)
    assert f"chown 0 {state}" in refused.value.remedy


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("lock", "the lock is made anew"),
        ("launcher.lock", "the lock is made anew"),
        ("service", "mount --bind"),
    ],
)
def test_link_in_place_of_a_part_is_refused_by_name(state: Path, name: str, remedy: str) -> None:
    (state / name).symlink_to("/nowhere")
    with pytest.raises(ConfigError, match=f": {name} in it is a link") as refused:
        make_state_directory(state)
    assert remedy in refused.value.remedy


def test_own_link_to_a_directory_is_followed(tmp_path: Path, state: Path) -> None:
    (tmp_path / "link").symlink_to(state)
    make_state_directory(tmp_path / "link")


def test_link_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("missing")
    with pytest.raises(ConfigError, match="a link to missing, which does not exist") as refused:
        make_state_directory(tmp_path / "link")
    assert "mount the disk" in refused.value.remedy
    assert not (tmp_path / "missing").exists()


@as_root
def test_link_of_another_user_is_refused(tmp_path: Path, state: Path) -> None:
    (tmp_path / "link").symlink_to(state)
    os.chown(tmp_path / "link", USER, USER, follow_symlinks=False)
    with pytest.raises(ConfigError, match=f"a link of user {USER}'s") as refused:
        make_state_directory(tmp_path / "link")
    assert "chown -h 0" in refused.value.remedy


def test_error_of_the_disk_names_the_file_and_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot use worker\.state_dir") as refused:
        make_state_directory(tmp_path / "file" / "state")
    assert str(tmp_path / "file") in refused.value.message
    assert refused.value.remedy == "move away the file that is in its place"
    with pytest.raises(ConfigError) as refused:
        make_state_directory(tmp_path / "file" / "deep" / "state")
    assert refused.value.remedy == "move away the file that is in its place"
    with pytest.raises(ConfigError) as refused:
        holds(tmp_path / ("x" * 300))
    assert refused.value.remedy == "give it a shorter path"


# --- the service's own part -----------------------------------------------------------------


@as_root
def test_all_of_the_service_becomes_its_users(state: Path) -> None:
    make_service_directory(state, USER, USER)
    job = state / "service" / "spool" / "7"
    job.mkdir(mode=0o500)
    (job / "log").write_text("said")
    (job / "log").chmod(0o400)
    make_service_directory(state, OTHER, OTHER)
    for path, mode in (
        (state / "service", 0o700),
        (state / "service" / "spool", 0o700),
        (job, 0o700),
        (job / "log", 0o600),
    ):
        status = path.stat()
        assert (status.st_uid, status.st_gid) == (OTHER, OTHER), path
        assert mode_of(path) == mode, path
    assert (state.stat().st_uid, (state / "stage").stat().st_uid) == (0, 0)


@as_root
def test_mark_of_a_removal_and_what_others_may_read_stay(state: Path) -> None:
    make_service_directory(state, USER, USER)
    mark = state / "service" / "spool" / "7.removed"
    mark.touch()
    mark.chmod(0o1444)
    make_service_directory(state, USER, USER)
    assert mode_of(mark) == 0o1644
    os.chown(mark, OTHER, OTHER)
    mark.chmod(0o4755)
    make_service_directory(state, USER, USER)
    assert mode_of(mark) == 0o755, "no program of the service's runs with its rights"


@as_root
def test_links_and_files_with_a_second_name_are_left_alone(tmp_path: Path, state: Path) -> None:
    make_service_directory(state, USER, USER)
    for name in ("roots", "linked"):
        (tmp_path / name).write_text("secret")
    (state / "service" / "link").symlink_to(tmp_path / "linked")
    os.link(tmp_path / "roots", state / "service" / "second")
    make_service_directory(state, USER, USER)
    assert (tmp_path / "roots").stat().st_uid == 0
    assert (tmp_path / "linked").stat().st_uid == 0
    assert (state / "service" / "link").lstat().st_uid == 0


@as_root
def test_entries_of_a_right_directory_are_not_read(state: Path) -> None:
    """A start with a hundred thousand jobs must not look at each one's files."""
    make_service_directory(state, USER, USER)
    job = state / "service" / "spool" / "7"
    job.mkdir(mode=0o700)
    (job / "log").touch()
    os.chown(job, USER, USER)
    make_service_directory(state, USER, USER)
    assert (job / "log").stat().st_uid == 0
    os.chown(job, OTHER, USER)
    make_service_directory(state, USER, USER)
    assert (job / "log").stat().st_uid == USER, "a wrong one is, however deep"


@as_root
def test_directory_becomes_right_after_its_entries(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that is killed in the midst must not leave a right one with wrong entries."""
    make_service_directory(state, OTHER, OTHER)
    (state / "service" / "spool" / "7").mkdir()
    (state / "service" / "spool" / "7" / "log").touch()
    given, really = list[str](), os.chown

    def chown(path: str, *ids: int) -> None:
        given.append(Path(os.readlink(path)).name)
        really(path, *ids)

    monkeypatch.setattr(os, "chown", chown)
    make_service_directory(state, USER, USER)
    assert given == ["log", "7", "spool", "service"]
    given.clear()
    make_service_directory(state, USER, USER)
    assert given == ["service"], "what is right is left as it is"


@as_root
def test_wrong_group_or_mode_alone_is_mended(state: Path) -> None:
    make_service_directory(state, USER, USER)
    spool = state / "service" / "spool"
    for name in ("group", "mode"):
        (spool / name).touch(mode=0o600)
        os.chown(spool / name, USER, OTHER if name == "group" else USER)
    (spool / "mode").chmod(0o400)
    make_service_directory(state, USER, USER)
    assert (spool / "group").stat().st_gid == USER
    assert mode_of(spool / "mode") == 0o600


@as_root
def test_file_that_cannot_be_given_is_named(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chown(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chown", chown)
    with pytest.raises(ConfigError, match="/service/spool to the service's user") as refused:
        make_service_directory(state, USER, USER)
    assert "chattr -i -a" in refused.value.remedy


@as_root
def test_no_descriptor_is_left(state: Path) -> None:
    make_service_directory(state, USER, USER)
    (state / "service" / "spool" / "7").mkdir()
    before = os.listdir("/proc/self/fd")
    make_service_directory(state, OTHER, OTHER)
    assert os.listdir("/proc/self/fd") == before


def test_own_user_owns_the_service_without_root(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: USER)
    make_service_directory(state, OTHER, OTHER)
    assert (state / "service" / "spool").stat().st_uid == os.getuid()


# --- the locks ------------------------------------------------------------------------------


class PlayedTime:
    """Time that passes by sleep alone."""

    def __init__(self, after: Callable[[], object] = lambda: None) -> None:
        self.now, self.sleeps, self._after = 0.0, 0, after

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.sleeps += 1
        self._after()


def test_second_service_is_refused_at_once(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    time = PlayedTime()
    monkeypatch.setattr(state_directory, "time", time)
    held = lock_for_service(state)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ConfigError, match="another service is running with it") as refused:
        lock_for_service(state)
    assert refused.value.remedy
    assert time.sleeps == 0
    assert os.listdir("/proc/self/fd") == before
    os.close(held)
    os.close(lock_for_service(state))


def test_launcher_waits_as_long_as_it_was_told_for_an_earlier_one(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = lock_for_launcher(state, 0)
    os.close(lock_for_service(state))
    time = PlayedTime()
    monkeypatch.setattr(state_directory, "time", time)
    with pytest.raises(ConfigError, match="another launcher is running with it") as refused:
        lock_for_launcher(state, 2)
    assert "launcher.socket" in refused.value.remedy
    assert time.now == pytest.approx(2, abs=0.1)
    monkeypatch.setattr(state_directory, "time", PlayedTime(lambda: os.close(held)))
    os.close(lock_for_launcher(state, 2))


def test_lock_ends_with_its_last_duplicate(state: Path) -> None:
    held = lock_for_service(state)
    again = os.dup(held)
    os.close(held)
    with pytest.raises(ConfigError):
        lock_for_service(state)
    os.close(again)
    os.close(lock_for_service(state))


def test_lock_is_its_owners_alone_and_not_inherited(state: Path) -> None:
    held = lock_for_service(state)
    assert mode_of(state / "lock") == 0o600
    assert not os.get_inheritable(held)
    os.close(held)


def test_lock_follows_no_link(state: Path, tmp_path: Path) -> None:
    (state / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError) as refused:
        lock_for_service(state)
    assert refused.value.remedy == "put the file itself in place of the link"
    assert not (tmp_path / "elsewhere").exists()
