"""The client's files: read anew where they have changed; a key that others can read is told."""

import logging
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trio

from jobworker.client.credentials import SETTLE_SECONDS, Credentials
from jobworker.errors import CredentialsUnusable
from jobworker.pki.administration import init_authority


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A directory with two sets of files: those of admin and of viewer."""
    init_authority(tmp_path / "certs", [], now=datetime.now(UTC))
    for kind in ("cert", "key"):
        shutil.copy(tmp_path / "certs" / f"admin-client-{kind}.pem", tmp_path / f"{kind}.pem")
    return tmp_path


def credentials(files: Path) -> Credentials:
    return Credentials(files / "certs" / "ca-cert.pem", files / "cert.pem", files / "key.pem")


def renew(files: Path, *kinds: str) -> None:
    for kind in kinds:
        shutil.copy(files / "certs" / f"viewer-client-{kind}.pem", files / f"{kind}.pem")


async def test_changed_files_make_a_new_context_and_others_do_not(files: Path) -> None:
    mine = credentials(files)
    first = mine.read()
    assert await mine.renewed() is first
    renew(files, "cert", "key")
    assert await mine.renewed() is not first


async def test_files_that_do_not_fit_yet_are_given_a_moment(
    files: Path, autojump_clock: object
) -> None:
    mine = credentials(files)
    first = mine.read()
    renew(files, "cert")

    async def finish() -> None:
        await trio.sleep(SETTLE_SECONDS / 2)
        renew(files, "key")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(finish)
        assert await mine.renewed() is not first


async def test_files_that_are_gone_leave_the_last_good_context(
    files: Path, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    mine = Credentials(Path("certs/ca-cert.pem"), Path("cert.pem"), Path("key.pem"))
    first = mine.read()
    monkeypatch.chdir("/")
    assert await mine.renewed() is first
    (files / "key.pem").unlink()
    assert await mine.renewed() is first
    with pytest.raises(CredentialsUnusable, match=r"key\.pem: there is no such file"):
        credentials(files).read()


@pytest.mark.parametrize(("mode", "told"), [(0o600, False), (0o644, True), (0o640, True)])
def test_key_that_others_can_read_is_told_once(
    files: Path, caplog: pytest.LogCaptureFixture, mode: int, told: bool
) -> None:
    (files / "key.pem").chmod(mode)
    mine = credentials(files)
    with caplog.at_level(logging.WARNING):
        mine.read()
        mine.read()
    assert [record.name for record in caplog.records] == ["jobworker.client"] * told
    assert all(f"(mode {mode:04o}); chmod 600" in r.getMessage() for r in caplog.records)
