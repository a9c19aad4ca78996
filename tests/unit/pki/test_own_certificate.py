"""What a client's own file tells of a refusal: the cause, or nothing that was not so."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from jobworker.errors import CertificateRefused
from jobworker.pki.administration import init_authority
from jobworker.pki.own_certificate import with_cause


def refusal(alert: str) -> CertificateRefused:
    return CertificateRefused("cannot connect: refused", remedy="ask", data={"alert": alert})


@pytest.mark.parametrize("begins_in", [timedelta(days=2), -timedelta(hours=2)])
def test_certificate_that_is_not_valid_yet_is_found_out(
    tmp_path: Path, begins_in: timedelta
) -> None:
    init_authority(tmp_path / "certs", [], now=datetime.now(UTC) + begins_in)
    path = tmp_path / "certs" / "admin-client-cert.pem"
    told = with_cause(refusal("bad_certificate"), path)
    assert "is not valid yet" in told.message
    assert "here it is 20" in told.message
    assert ("the server's clock may be behind" in told.message) == (begins_in < timedelta())
    assert told.remedy == "ask"


@pytest.mark.parametrize("begun", [timedelta(days=5000), timedelta(days=2)])
def test_certificate_that_has_expired_is_told_from_a_clock_that_is_ahead(
    tmp_path: Path, begun: timedelta
) -> None:
    init_authority(tmp_path / "certs", [], now=datetime.now(UTC) - begun)
    told = with_cause(refusal("certificate_expired"), tmp_path / "certs" / "admin-client-cert.pem")
    assert "has expired" in told.message
    assert ("the server's clock may be ahead" in told.message) == (begun.days < 5000)


def test_other_refusals_and_unreadable_files_are_left_as_they_are(tmp_path: Path) -> None:
    for alert, path in (("certificate_revoked", tmp_path), ("bad_certificate", tmp_path / "none")):
        refused = refusal(alert)
        assert with_cause(refused, path) is refused
