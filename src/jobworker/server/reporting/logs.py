"""Log records on standard error, as text for people or JSON for programs, one line each.

A message, or the exception of a traceback, may contain text that clients and jobs chose (names,
commands). So control characters are escaped, and such text can neither forge a second record nor
move a terminal's cursor. A traceback follows its record indented, so none of its lines looks like a
record.
"""

import logging
import sys
import textwrap
from datetime import UTC, datetime
from functools import partial
from typing import Literal

from jobworker.serialization.json_text import dumps
from jobworker.server.reporting.standard_error import StandardError

_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}
_ESCAPES |= {0x2028: "\\u2028", 0x2029: "\\u2029"}
_TRACE_ESCAPES = {code: text for code, text in _ESCAPES.items() if code != ord("\n")}
_JSON_ESCAPES = {code: f"\\u{code:04x}" for code in _ESCAPES}


class _Formatter(logging.Formatter):
    def __init__(self, form: Literal["text", "json"]) -> None:
        super().__init__()
        self._form = form

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        moment = moment.replace("+00:00", "Z")
        message = record.getMessage()
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        if self._form == "json":
            fields = {
                "time": moment,
                "level": record.levelname,
                "logger": record.name,
                "message": message,
            }
            # JSON itself asks only for the escapes below U+0020 (RFC 8259, section 7).
            return dumps({**fields, "trace": trace} if trace else fields).translate(_JSON_ESCAPES)
        line = f"{moment} {record.levelname} {message}".translate(_ESCAPES)
        trace = textwrap.indent(trace.translate(_TRACE_ESCAPES), "    ")
        return f"{line}\n{trace}" if trace else line


def _note_of_loss(formatter: logging.Formatter, lines: int) -> str:
    message = f"standard error took nothing for a while: {lines} lines before this one were lost"
    record = logging.LogRecord(
        *("jobworker.server", logging.WARNING, __file__, 0), message, args=None, exc_info=None
    )
    return f"{formatter.format(record)}\n"


def set_up_logging(level: str, form: Literal["text", "json"]) -> None:
    """Send the records of `jobworker` to standard error, from the configured `level` on."""
    handler, formatter = logging.StreamHandler(sys.stderr), _Formatter(form)
    handler.setFormatter(formatter)
    if isinstance(sys.stderr, StandardError):
        sys.stderr.note = partial(_note_of_loss, formatter)
    root = logging.getLogger("jobworker")
    root.handlers[:] = [handler]
    root.propagate = False
    root.setLevel("WARNING" if level == "WARN" else level)
