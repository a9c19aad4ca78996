"""What a job's bytes become before a person sees them."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker.cli.worker_cli.control_characters import LineStamper, TerminalFilter


@pytest.mark.parametrize(
    ("pieces", "seen"),
    [
        ([b"a\tb\r\n"], b"a\tb\r\n"),
        ([b"a\r", b"\n"], b"a\r\n"),
        ([b"ok\rno"], b"ok\\x0dno"),
        ([b"ok\r", b"no"], b"ok\\x0dno"),
        ([b"ok\r"], b"ok\\x0d"),
        ([b"\r\r\n"], b"\\x0d\r\n"),
        ([b"\x1b[31mred\x07\x00\x7f"], b"\\x1b[31mred\\x07\\x00\\x7f"),
        ([b"back\x08\x0b\x0c"], b"back\\x08\\x0b\\x0c"),
        ([b"\xc2\x9b31m"], b"\\x9b31m"),
        ([b"\xc2", b"\x9b"], b"\\x9b"),
        ([b"\xe2\x82", b"\xac"], b"\xe2\x82\xac"),
        ([b"\x9b\xff"], b"\\x9b\\xff"),
        ([b"\xe2\x82"], b"\\xe2\\x82"),
        (["a\u202eb".encode()], b"a\\u202eb"),
        (["ä€😀".encode()], "ä€😀".encode()),
    ],
)
def test_what_a_terminal_would_act_on_becomes_visible(pieces: list[bytes], seen: bytes) -> None:
    kept = TerminalFilter()
    shown = [kept.feed(piece) for piece in pieces]
    assert b"".join([*shown, kept.feed(b"", final=True)]) == seen


@given(st.lists(st.binary(max_size=20)))
def test_nothing_acts_however_it_is_split(pieces: list[bytes]) -> None:
    split, whole = TerminalFilter(), TerminalFilter()
    shown = b"".join(map(split.feed, pieces)) + split.feed(b"", final=True)
    assert shown == whole.feed(b"".join(pieces), final=True)
    text = shown.decode().replace("\r\n", "\n")
    assert all(c in "\n\t" or (c >= " " and not "\x7f" <= c <= "\x9f") for c in text)


def test_each_line_bears_the_time_of_its_first_byte() -> None:
    stamper = LineStamper()
    first = datetime(2026, 1, 31, 12, 0, 0, 1500, tzinfo=timezone(timedelta(hours=1)))
    second = datetime(2026, 1, 31, 11, 0, 1, tzinfo=UTC)
    seen = stamper.feed(b"one\ntw", first) + stamper.feed(b"o\n", second)
    seen += stamper.feed(b"\nthree", second)
    assert seen == (
        b"2026-01-31T11:00:00.001500Z one\n"
        b"2026-01-31T11:00:00.001500Z two\n"
        b"2026-01-31T11:00:01.000000Z \n"
        b"2026-01-31T11:00:01.000000Z three"
    )


@given(st.lists(st.binary(min_size=1, max_size=20)))
def test_stamps_are_all_that_is_added(pieces: list[bytes]) -> None:
    stamper, moment = LineStamper(), datetime(2026, 1, 31, tzinfo=UTC)
    seen = b"".join(stamper.feed(piece, moment) for piece in pieces)
    stamp = b"2026-01-31T00:00:00.000000Z "
    rest = b"".join(line.removeprefix(stamp) for line in _lines(seen))
    assert rest == b"".join(pieces)
    assert all(line.startswith(stamp) for line in _lines(seen))


def _lines(data: bytes) -> list[bytes]:
    *whole, rest = data.split(b"\n")
    return [line + b"\n" for line in whole] + ([rest] if rest else [])
