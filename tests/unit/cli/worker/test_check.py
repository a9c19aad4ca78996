"""`worker check`: what it says of its findings."""

from pathlib import Path

import pytest
from attrs import evolve

from jobworker.cli.worker import check_service
from jobworker.cli.worker.check import table
from jobworker.config.settings import Settings
from jobworker.sandbox.check.probing import Finding


@pytest.mark.parametrize(
    ("lacking", "absent", "verdict"),
    [
        (1, 4, "1 needed thing is missing; 4 optional things are missing."),
        (2, 1, "2 needed things are missing; 1 optional thing is missing."),
        (0, 0, "All that is needed is there; 0 optional things are missing."),
    ],
)
def test_verdict_says_what_is_missing(lacking: int, absent: int, verdict: str) -> None:
    found = [Finding("limits", "there", True, True, "", "")]
    found += [Finding("limits", "needed", False, True, "", "")] * lacking
    found += [Finding("limits", "optional", False, False, "", "")] * absent
    assert table(found, "root").splitlines()[-1] == verdict


def finding(name: str, settings: Settings) -> Finding:
    (found,) = [each for each in check_service.findings(settings) if each.name == name]
    return found


def test_missing_key_is_named_with_a_remedy(tmp_path: Path) -> None:
    security = evolve(Settings().security, server_key=str(tmp_path / "none.pem"))
    found = finding("mode of the key", evolve(Settings(), security=security))
    assert found.detail == f"cannot examine the key {tmp_path}/none.pem: No such file or directory"
    assert "worker certs init" in found.remedy


def test_state_directory_that_cannot_be_looked_for_is_missing(tmp_path: Path) -> None:
    state = tmp_path / (256 * "x") / "state"
    worker = evolve(Settings().worker, state_dir=str(state))
    found = finding("state directory", evolve(Settings(), worker=worker))
    assert not found.supported
    assert f"worker.state_dir {state}: File name too long" in found.detail
    assert found.remedy == "give it a shorter path"
    assert check_service.nearest_directory(state) == tmp_path
