"""Durations and sizes: strict to read, and what is written can be read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker.model.units import (
    MAX_DURATION_SECONDS,
    format_duration,
    format_limit,
    format_mebibytes,
    format_size,
    parse_duration,
)

from ..strategies import any_text, examples


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("0", 0),
        ("1.5", 1.5),
        ("500ms", 0.5),
        ("10s", 10),
        ("10m", 600),
        ("1h30m", 5400),
        ("2d", 172_800),
        ("1d2h3m4s", 93_784),
        (" 5s ", 5),
        ("1.5h", 5400),
    ],
)
def test_duration_is_read_as_people_write_it(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "s",
        "-1",
        "-1s",
        "+1",
        "1 h",
        "1h 30m",
        "1x",
        "h1",
        "1.",
        ".5",
        "1e3",
        "inf",
        "nan",
        "1h-30m",
        "1H",
        "1,5s",
        "0x10",
        "1_000",
        "٣",
        "٣s",
        "³s",
        "1s\x00",
        "1s\n1s",
    ],
)
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(text)


def test_more_than_ten_years_is_refused_and_ten_years_are_not() -> None:
    assert parse_duration("3650d") == MAX_DURATION_SECONDS
    for text in ("3651d", "9" * 400, "9" * 400 + "d", str(MAX_DURATION_SECONDS + 1)):
        with pytest.raises(ValueError, match="longer than ten years"):
            parse_duration(text)


@examples(max_examples=300)
@given(any_text | st.text("0123456789.msdh ", max_size=12))
def test_any_text_is_a_duration_within_bounds_or_refused(text: str) -> None:
    try:
        seconds = parse_duration(text)
    except ValueError:
        return
    assert 0 <= seconds <= MAX_DURATION_SECONDS


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0ms"),
        (0.35, "350ms"),
        (1, "1.0s"),
        (12.34, "12.3s"),
        (60, "1m"),
        (250, "4m10s"),
        (3599.4, "59m59s"),
        (3599.6, "1h"),
        (7500, "2h5m"),
        (86_399.6, "1d"),
        (90_000, "1d1h"),
        (262_800, "3d1h"),
    ],
)
def test_duration_is_written_in_at_most_two_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@examples(max_examples=300)
@given(st.floats(min_value=0, max_value=MAX_DURATION_SECONDS - 3600))
def test_written_duration_is_read_back_to_its_last_unit(seconds: float) -> None:
    grain = next(
        grain
        for bound, grain in ((1, 0.001), (60, 0.1), (3600, 1), (86_400, 60), (1e12, 3600))
        if seconds < bound
    )
    assert parse_duration(format_duration(seconds)) == pytest.approx(seconds, abs=grain * 1.01)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (64 << 20, "64.0 MiB"),
        (3 << 30, "3.0 GiB"),
        (5 << 40, "5.0 TiB"),
        (5 << 50, "5120.0 TiB"),
    ],
)
def test_size_is_written_in_binary_units(count: int, text: str) -> None:
    assert format_size(count) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        *((0, "0 B"), (1, "1 B"), (1500, "1500 B"), (1024, "1 KiB"), (64 << 20, "64 MiB")),
        *((1100 << 20, "1100 MiB"), (1 << 30, "1 GiB"), (1 << 50, "1024 TiB")),
    ],
)
def test_limit_is_told_exactly(count: int, text: str) -> None:
    assert format_limit(count) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 MiB"), (64 << 20, "64 MiB"), ((64 << 20) + 1, "64.1 MiB"), (3 << 19, "1.5 MiB")],
)
def test_what_is_more_than_a_limit_reads_as_more(count: int, text: str) -> None:
    assert format_mebibytes(count) == text
