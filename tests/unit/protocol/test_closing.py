"""Closing codes: each asks one thing of the client, and the documents name those that are sent."""

from pathlib import Path

import pytest

from jobworker.protocol.closing import (
    GOING_AWAY,
    REFUSED,
    TOO_BIG,
    TRY_AGAIN,
    Verdict,
    verdict,
)

PAGE = Path(__file__).parents[3] / "docs" / "protocol.md"


@pytest.mark.parametrize(
    ("code", "asked"),
    [
        (1000, Verdict.AGAIN),
        (GOING_AWAY, Verdict.AGAIN),
        (TRY_AGAIN, Verdict.AGAIN),
        (1006, Verdict.AGAIN),
        (1012, Verdict.AGAIN),
        (4711, Verdict.AGAIN),
        (REFUSED, Verdict.RENEW),
        (TOO_BIG, Verdict.TOO_LARGE),
        (1002, Verdict.FATAL),
        (1011, Verdict.FATAL),
    ],
)
def test_each_code_asks_for_one_thing(code: int, asked: Verdict) -> None:
    assert verdict(code) is asked


@pytest.mark.parametrize("code", [GOING_AWAY, REFUSED, TOO_BIG, TRY_AGAIN])
def test_codes_that_the_service_sends_stand_on_the_page(code: int) -> None:
    closing = PAGE.read_text().partition("## Closing")[2].partition("## Limits")[0]
    assert f"| {code} |" in closing
