"""Default paths: the host's for root, else by the XDG Base Directory Specification."""

import os
from pathlib import Path

import pytest

from jobworker.config import default_paths


def test_root_has_the_hosts_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_paths.default_state_directory() == "/var/lib/jobworker"
    assert default_paths.default_configuration() == Path("/etc/jobworker/worker.toml")
    assert default_paths.default_certificate("ca-cert.pem") == "/etc/jobworker/certs/ca-cert.pem"


@pytest.mark.parametrize(
    ("state_home", "state"),
    [
        ("/data/state", "/data/state/jobworker"),
        ("relative", "/home/alice/.local/state/jobworker"),
        ("", "/home/alice/.local/state/jobworker"),
    ],
)
def test_a_user_has_its_own(monkeypatch: pytest.MonkeyPatch, state_home: str, state: str) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", "/home/alice")
    monkeypatch.setenv("XDG_STATE_HOME", state_home)
    monkeypatch.setenv("XDG_CONFIG_HOME", "/data/config")
    assert default_paths.default_state_directory() == state
    assert default_paths.default_certificate("a.pem") == "/data/config/jobworker/certs/a.pem"


def test_a_user_without_a_home_has_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for call in ("getuid", "geteuid"):
        monkeypatch.setattr(os, call, lambda: 3_000_000_000)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert default_paths.default_state_directory().startswith("/nonexistent/")


def test_configuration_is_used_where_it_stands_or_may_stand(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A name that is too long stands for a directory that is closed to this user."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert default_paths.configuration_in_use() is None
    file = tmp_path / "jobworker" / "worker.toml"
    file.parent.mkdir()
    file.touch()
    assert default_paths.configuration_in_use() == file
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / (256 * "x")))
    assert default_paths.configuration_in_use() == default_paths.default_configuration()
