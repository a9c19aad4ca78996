"""The snapshot of /etc: only what is allowed, and of that only what everyone may read."""

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobworker.sandbox.root import etc_snapshot
from jobworker.sandbox.root.etc_snapshot import EtcEntry, snapshot_etc


@pytest.fixture
def host() -> Iterator[Path]:
    """A directory that every user may pass to, unlike those of pytest, with an etc in it."""
    path = Path(tempfile.mkdtemp()).resolve()
    path.chmod(0o755)
    (path / "etc").mkdir(mode=0o755)
    (path / "outside").mkdir(mode=0o755)
    yield path
    shutil.rmtree(path)


def put(path: Path, content: str = "x", mode: int = 0o644) -> Path:
    for directory in reversed(path.parents):
        if not directory.exists():
            directory.mkdir(mode=0o755)
    path.write_text(content)
    path.chmod(mode)
    return path


def shown(host: Path, *names: str) -> dict[str, EtcEntry]:
    """The entries of the snapshot by their path below etc."""
    base = str(host / "etc")
    entries = snapshot_etc(names, base)
    assert len({entry.path for entry in entries}) == len(entries)
    return {os.path.relpath(entry.path, base): entry for entry in entries}


def test_only_allowed_names_are_shown(host: Path) -> None:
    put(host / "etc/hosts", "127.0.0.1 localhost")
    put(host / "etc/secret")
    put(host / "etc/hostsfile")
    found = shown(host, "hosts", "absent")
    assert set(found) == {"hosts"}
    assert found["hosts"].content == b"127.0.0.1 localhost"
    assert found["hosts"].target is None


def test_directory_is_shown_with_all_below(host: Path) -> None:
    put(host / "etc/ssl/certs/a.pem", "A")
    put(host / "etc/ssl/certs/more/b.pem", "B")
    put(host / "etc/ssl/private/key.pem", "KEY")
    found = shown(host, "ssl/certs")
    assert set(found) == {"ssl/certs", "ssl/certs/a.pem", "ssl/certs/more", "ssl/certs/more/b.pem"}
    directory = found["ssl/certs"]
    assert (directory.mode, directory.content, directory.target) == (0o755, None, None)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o660, 0o000, 0o711])
def test_file_that_not_everyone_may_read_is_not_shown(host: Path, mode: int) -> None:
    put(host / "etc/conf/shadow", "hash", mode)
    put(host / "etc/conf/public")
    assert set(shown(host, "conf", "conf/shadow")) == {"conf", "conf/public"}


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o754, 0o751])
def test_directory_that_not_everyone_may_read_and_pass_is_not_shown(host: Path, mode: int) -> None:
    put(host / "etc/private/inner/file")
    (host / "etc/private").chmod(mode)
    assert shown(host, "private") == {}


def test_name_behind_a_directory_that_not_everyone_may_pass_is_not_shown(host: Path) -> None:
    put(host / "etc/private/inner/file")
    (host / "etc/private").chmod(0o700)
    assert shown(host, "private/inner", "private/inner/file") == {}


def test_link_within_what_is_allowed_stays_a_link(host: Path) -> None:
    put(host / "etc/ssl/certs/a.pem")
    (host / "etc/ssl/certs/b.pem").symlink_to("a.pem")
    (host / "etc/localtime").symlink_to("/usr/share/zoneinfo/UTC")
    found = shown(host, "ssl/certs", "localtime")
    assert found["ssl/certs/b.pem"].target == "a.pem"
    assert found["ssl/certs/b.pem"].content is None
    assert found["localtime"].target == "/usr/share/zoneinfo/UTC"


def test_link_to_a_file_elsewhere_becomes_that_file(host: Path) -> None:
    put(host / "outside/stub-resolv.conf", "nameserver 127.0.0.53")
    (host / "etc/resolv.conf").symlink_to("../outside/stub-resolv.conf")
    entry = shown(host, "resolv.conf")["resolv.conf"]
    assert (entry.content, entry.target) == (b"nameserver 127.0.0.53", None)


def test_link_does_not_reach_what_not_everyone_may_read(host: Path) -> None:
    put(host / "outside/secret", "secret", 0o600)
    put(host / "outside/closed/file", "secret", 0o644)
    (host / "outside/closed").chmod(0o700)
    put(host / "etc/shadow", "secret", 0o640)
    for name, target in {
        "to-secret": "../outside/secret",
        "to-closed": "../outside/closed/file",
        "to-shadow": "shadow",
        "to-directory": "../outside",
        "to-root": "/",
        "nowhere": "absent",
    }.items():
        (host / "etc" / name).symlink_to(target)
        assert shown(host, name) == {}, name


def test_link_to_a_neighbour_of_what_is_allowed_is_no_way_out(host: Path) -> None:
    put(host / "etc/ssl/certs-private/key", "secret", 0o600)
    put(host / "etc/ssl/certs/a.pem")
    (host / "etc/ssl/certs/link").symlink_to("../certs-private/key")
    assert set(shown(host, "ssl/certs")) == {"ssl/certs", "ssl/certs/a.pem"}


@pytest.mark.parametrize("name", ["../outside/file", "/outside/file", "a/../../outside/file", ".."])
def test_names_outside_of_etc_are_not_shown(host: Path, name: str) -> None:
    put(host / "outside/file")
    assert shown(host, name) == {}


def test_special_and_very_large_files_are_passed_over(host: Path) -> None:
    os.mkfifo(host / "etc/fifo")  # to read it would block for ever
    (host / "etc/fifo").chmod(0o644)
    large = put(host / "etc/large")
    os.truncate(large, etc_snapshot._MAX_FILE_BYTES + 1)
    put(host / "etc/link-target")
    (host / "etc/device").symlink_to("/dev/zero")
    assert shown(host, "fifo", "large", "device") == {}


@pytest.mark.parametrize(
    ("mode", "kept"),
    [(0o444, 0o644), (0o644, 0o644), (0o755, 0o755), (0o4755, 0o755), (0o2777, 0o755)],
)
def test_copies_are_for_their_owner_to_change_and_set_no_ids(
    host: Path, mode: int, kept: int
) -> None:
    put(host / "etc/profile", mode=mode)
    assert shown(host, "profile")["profile"].mode == kept


def test_number_of_entries_is_bounded(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(etc_snapshot, "_MAX_ENTRIES", 3)
    for number in range(10):
        put(host / f"etc/many/{number}")
    assert len(shown(host, "many")) == 3


def test_secrets_of_this_host_are_never_in_the_default_snapshot() -> None:
    from jobworker.config.settings import DEFAULT_ETC  # the launcher itself does not import it

    entries = snapshot_etc(DEFAULT_ETC)
    paths = {entry.path for entry in entries}
    assert "/etc/passwd" in paths
    assert not any("shadow" in path or "/ssh/" in path or "private" in path for path in paths)
    for entry in entries:
        if entry.content is not None:
            assert os.stat(entry.path).st_mode & stat.S_IROTH
