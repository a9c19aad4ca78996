"""A launcher that runs on its own, as systemd would run it, for the tests."""

import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from jobworker.cli.worker.embedded_service import program
from jobworker.pki.administration import init_authority

from ..services import write_configuration

START_SECONDS = 30
END_SECONDS = 30

Extra = dict[str, Mapping[str, object]]


def settings_with(directory: Path, extra: Mapping[str, Mapping[str, object]]) -> Extra:
    """Settings by which a service uses the launcher of `directory`."""
    return {**extra, "launcher": {"socket": str(directory / "launcher.sock")}}


@contextmanager
def open_launcher(
    directory: Path, extra: Mapping[str, Mapping[str, object]] | None = None
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run `worker launcher` until it is ready, and end it in the end, by SIGTERM."""
    directory.chmod(0o755)
    if not (directory / "certs").exists():
        init_authority(directory / "certs", [], now=datetime.now(UTC))
    config = write_configuration(directory, settings_with(directory, extra or {}))
    path = str(directory / "launcher-notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notes:
        notes.bind(path)
        with (directory / "launcher-log").open("ab") as log:
            process = subprocess.Popen(
                [*program("worker"), "launcher", "--config", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "NOTIFY_SOCKET": path},
            )
        try:
            notes.settimeout(START_SECONDS)
            try:
                assert notes.recv(100) == b"READY=1"
            except TimeoutError:
                raise AssertionError((directory / "launcher-log").read_text()) from None
            yield process
        finally:
            os.unlink(path)
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            process.wait(timeout=END_SECONDS)
