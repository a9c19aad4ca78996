"""Log records: one line each, whatever clients and jobs put into them."""

import contextlib
import io
import json
import logging
import re
from collections.abc import Iterator
from typing import Literal

import pytest
from hypothesis import given

from jobworker.server.reporting.logs import set_up_logging

from ...strategies import any_text, examples

TEXT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (DEBUG|INFO|WARNING|ERROR) ")
CONTROLS = {*map(chr, range(32)), *map(chr, range(127, 160)), "\u2028", "\u2029"}
NASTY = "a\nb\r\x1b[2J\x9b2J\x7f\x00\x85\u2028\u2029é"


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    log = logging.getLogger("jobworker")
    before = (log.handlers[:], log.propagate, log.level)
    yield
    log.handlers[:], log.propagate, level = before
    log.setLevel(level)


class Log:
    """A logger that is set up, and what it has written."""

    def __init__(self, form: Literal["text", "json"], level: str = "DEBUG") -> None:
        self._stream = io.StringIO()
        with contextlib.redirect_stderr(self._stream):
            set_up_logging(level, form)
        self.logger = logging.getLogger("jobworker.test")

    @property
    def lines(self) -> list[str]:
        written = self._stream.getvalue()
        assert written == "" or written.endswith("\n")
        return written.split("\n")[:-1]


def log_fault(log: Log, what: str) -> None:
    try:
        raise ValueError(what)
    except ValueError:
        log.logger.exception("incident %s", "1a2b")


def test_text_record_is_time_level_and_message() -> None:
    log = Log("text")
    log.logger.info("%s: connected", "alice")
    (line,) = log.lines
    assert TEXT.match(line)
    assert line.endswith(" INFO alice: connected")


def test_json_record_is_one_object() -> None:
    log = Log("json")
    log.logger.warning("job %d", 7)
    (line,) = log.lines
    record = json.loads(line)
    assert TEXT.match(f"{record.pop('time')} INFO ")
    assert record == {"level": "WARNING", "logger": "jobworker.test", "message": "job 7"}


@examples(max_examples=200)
@given(any_text)
def test_text_record_of_any_message_is_one_line_without_controls(message: str) -> None:
    log = Log("text")
    log.logger.info("%s", message)
    (line,) = log.lines
    assert TEXT.match(line)
    assert not CONTROLS & set(line)


@examples(max_examples=200)
@given(any_text)
def test_json_record_of_any_message_is_one_line_that_holds_it(message: str) -> None:
    log = Log("json")
    log.logger.info("%s", message)
    (line,) = log.lines
    assert not CONTROLS & set(line)
    assert json.loads(line)["message"] == message


def test_control_characters_are_told_by_their_codes() -> None:
    log = Log("text")
    log.logger.info("%s", NASTY)
    told = r"a\x0ab\x0d\x1b[2J\x9b2J\x7f\x00\x85\u2028\u2029é"
    assert log.lines[0].endswith(f"INFO {told}")


def test_traceback_of_a_text_record_forges_no_record() -> None:
    log = Log("text")
    log_fault(log, f"{NASTY}\n2026-01-31T12:00:00.000Z INFO forged")
    first, *trace = log.lines
    assert first.endswith("ERROR incident 1a2b")
    assert any("ValueError" in line for line in trace)
    assert any("forged" in line for line in trace)
    for line in trace:
        assert line.startswith("    ")
        assert not CONTROLS & set(line)


def test_traceback_of_a_json_record_stands_in_its_one_line() -> None:
    log = Log("json")
    log_fault(log, NASTY)
    (line,) = log.lines
    assert not CONTROLS & set(line)
    assert f"ValueError: {NASTY}" in json.loads(line)["trace"]


@pytest.mark.parametrize(("level", "shown"), [("DEBUG", 4), ("INFO", 3), ("WARN", 2), ("ERROR", 1)])
def test_level_is_as_the_configuration_has_it(level: str, shown: int) -> None:
    log = Log("text", level)
    for number in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
        log.logger.log(number, "x")
    assert len(log.lines) == shown


def test_setting_up_again_does_not_double_the_records() -> None:
    Log("text")
    log = Log("text")
    log.logger.info("x")
    assert len(log.lines) == 1
