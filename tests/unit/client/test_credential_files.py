"""The client's files may be anything: what is no file of a certificate is refused at once."""

import os
import threading
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from jobworker.client.credentials import Credentials
from jobworker.client.opening import open_client
from jobworker.errors import CredentialsUnusable, InvalidParams
from jobworker.regular_file import read_regular

from .test_credentials import credentials, files

__all__ = ["files"]


def spoil(path: Path, kind: str) -> None:
    path.unlink()
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "sparse":
            path.touch()
            os.truncate(path, 1 << 40)


@pytest.mark.parametrize("name", ["cert.pem", "key.pem", "certs/ca-cert.pem"])
@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("fifo", "it is not a regular file"),
        ("device", "it is not a regular file"),
        ("sparse", "it is larger than 1048576 bytes"),
    ],
)
async def test_what_is_no_small_file_is_refused_at_once(
    files: Path, name: str, kind: str, why: str
) -> None:
    spoil(files / name, kind)
    with pytest.raises(CredentialsUnusable, match=rf"{files / name}: {why}"):
        credentials(files).read()
    with pytest.raises(CredentialsUnusable, match=why):
        async with open_client(
            "127.0.0.1:1",
            ca=files / "certs" / "ca-cert.pem",
            certificate=files / "cert.pem",
            key=files / "key.pem",
        ):
            raise AssertionError("it connected")


async def test_file_system_that_hangs_does_not_hold_the_event_loop(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = threading.Event()

    def hang(path: Path, most_bytes: int) -> bytes:
        assert goes_on.wait(60)
        return read_regular(path, most_bytes)

    monkeypatch.setattr("jobworker.client.credentials.read_regular", hang)
    mine: Credentials = credentials(files)
    try:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(mine.renewed)
                await wait_all_tasks_blocked()  # the loop runs
                scope.cancel()
        assert scope.cancelled_caught
    finally:
        goes_on.set()
    assert await mine.renewed() is await mine.renewed()


@pytest.mark.parametrize("name", ["ca", "certificate", "key"])
async def test_what_is_no_path_is_refused_in_few_words(files: Path, name: str) -> None:
    class Bytes:
        def __fspath__(self) -> bytes:
            return b"key.pem"

    good = {
        "ca": files / "certs" / "ca-cert.pem",
        "certificate": files / "cert.pem",
        "key": files / "key.pem",
    }
    for wrong in ("/" + "x" * 5_000_000, Bytes(), 7):
        with pytest.raises(InvalidParams, match=f"{name}: must be the path of a file") as raised:
            async with open_client("127.0.0.1:1", **{**good, name: wrong}):  # type: ignore[arg-type]
                raise AssertionError("it connected")
        assert len(str(raised.value)) < 1000
