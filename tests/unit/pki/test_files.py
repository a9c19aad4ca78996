"""New files, as the authority writes its set: closed, durable, all or none."""

import os
import resource
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jobworker import errors
from jobworker.pki.administration import init_authority

from .certificates import CERTIFICATES, FILES, NOW, read, verify_strictly


@pytest.fixture
def umask() -> Iterator[None]:
    old = os.umask(0)
    yield
    os.umask(old)


@pytest.mark.usefixtures("umask")
def test_modes_are_safe_whatever_the_umask(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "certs"
    init_authority(directory, [], now=NOW)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert sorted(os.listdir(directory)) == FILES
    for name in FILES:
        closed = name.endswith(("key.pem", "issued.json"))
        expected = 0o600 if closed else 0o644
        assert stat.S_IMODE((directory / name).stat().st_mode) == expected, name
        assert (directory / name).stat().st_nlink == 1


@pytest.mark.usefixtures("umask")
def test_keys_are_closed_from_their_first_instant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[int] = []
    chmod = os.fchmod

    def watch(fd: int, mode: int) -> None:
        modes.append(stat.S_IMODE(os.fstat(fd).st_mode))
        chmod(fd, mode)

    monkeypatch.setattr(os, "fchmod", watch)
    init_authority(tmp_path, [], now=NOW)
    assert modes == [0o600] * len(FILES)


def test_mode_of_existing_directory_is_left(tmp_path: Path) -> None:
    tmp_path.chmod(0o750)
    init_authority(tmp_path, [], now=NOW)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o750


@pytest.mark.parametrize("name", FILES)
def test_existing_file_is_kept_and_nothing_is_made(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("precious")
    with pytest.raises(errors.CredentialsUnusable, match="exists already") as caught:
        init_authority(tmp_path, [], now=NOW)
    assert str(tmp_path / name) in caught.value.message
    assert os.listdir(tmp_path) == [name]
    assert (tmp_path / name).read_text() == "precious"


def test_dangling_link_is_not_written_through(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    directory = tmp_path / "certs"
    directory.mkdir()
    (directory / "ca-key.pem").symlink_to(target)
    with pytest.raises(errors.CredentialsUnusable, match="exists already"):
        init_authority(directory, [], now=NOW)
    assert not target.exists()


def test_file_that_appears_meanwhile_wins_and_ours_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync
    rival = tmp_path / "viewer-client-cert.pem"  # published last

    def race(fd: int) -> None:
        rival.write_text("rival")
        sync(fd)

    monkeypatch.setattr(os, "fsync", race)
    with pytest.raises(errors.CredentialsUnusable, match="exists already"):
        init_authority(tmp_path, [], now=NOW)
    assert os.listdir(tmp_path) == [rival.name]
    assert rival.read_text() == "rival"


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "certs"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))  # a key fits, a certificate not
    try:
        with pytest.raises(errors.CredentialsUnusable, match="File too large") as caught:
            init_authority(directory, [], now=NOW)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(directory / "ca-cert.pem") in caught.value.message
    assert not directory.exists()


def test_two_calls_at_once_leave_one_whole_set(tmp_path: Path) -> None:
    for attempt in range(20):
        directory = tmp_path / str(attempt)
        directory.mkdir()
        barrier = threading.Barrier(2)

        def make(at: Path = directory, barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            try:
                init_authority(at, [], now=NOW)
            except errors.CredentialsUnusable:
                return False
            return True

        with ThreadPoolExecutor(2) as pool:
            outcomes = [call.result() for call in [pool.submit(make), pool.submit(make)]]
        assert sorted(outcomes) == [False, True]
        assert sorted(os.listdir(directory)) == FILES
        for stem in CERTIFICATES:
            verify_strictly(read(directory, stem), read(directory, "ca"), NOW)


def test_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link
    calls = 0

    def interrupt(source: str, target: str, **options: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        link(
            source,
            target,
            src_dir_fd=options["src_dir_fd"],
            dst_dir_fd=options["dst_dir_fd"],
            follow_symlinks=False,
        )

    monkeypatch.setattr(os, "link", interrupt)
    with pytest.raises(KeyboardInterrupt):
        init_authority(tmp_path, [], now=NOW)
    assert os.listdir(tmp_path) == []


def test_file_in_place_of_directory_is_named(tmp_path: Path) -> None:
    path = tmp_path / "certs"
    path.write_text("")
    for directory in (path, path / "below"):
        with pytest.raises(errors.CredentialsUnusable, match="cannot write") as caught:
            init_authority(directory, [], now=NOW)
        assert str(directory) in caught.value.message
