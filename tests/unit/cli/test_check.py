"""`worker check`: what it says of its findings."""

from pathlib import Path

import pytest
from attrs import evolve

from jobworker.cli import check_service
from jobworker.cli.check import table
from jobworker.config import Settings
from jobworker.sandbox.probing import Finding


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


def test_missing_key_is_named_with_a_remedy(tmp_path: Path) -> None:
    security = evolve(Settings().security, server_key=str(tmp_path / "none.pem"))
    (found,) = [
        each
        for each in check_service.findings(evolve(Settings(), security=security))
        if each.name == "mode of the key"
    ]
    assert found.detail == f"cannot look at the key {tmp_path}/none.pem: No such file or directory"
    assert "worker certs init" in found.remedy
