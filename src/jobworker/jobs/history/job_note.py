"""The note of a job beside its output: its record once more, with room set aside for its end.

The history is the truth wherever it knows as much. There are two cases in which it does not. An
administrator may lose it, or put an older copy back, while output and live jobs stay: a note says
whose job it was, what it ran and how it ended, so that the next service can adopt it (`takeover`).
And a full disk may refuse a record that clients were told of: the note takes it, since its room is
taken when the job is admitted, or else the job is refused. So no restart changes what was told.

A note is a file of lines of JSON. The first line is the whole record; each further line has what
changed since, without the request, which does not change. Zeros follow, up to the room that is set
aside. Where that is used up and the disk gives no more, or lines are many, the last line takes the
place of those before it, but the first. A line may be torn. Nothing calls fsync: after a power cut
a note has what the file system has kept.
"""

import errno
import fcntl
import os
from contextlib import suppress
from pathlib import Path

from attrs import evolve

from jobworker.errors import JobworkerError
from jobworker.jobs.history.spec_json import spec_pieces
from jobworker.jobs.output.directory import MAX_NOTE_BYTES, NOTE, disk_errors, mark_of
from jobworker.model.job import JobId, JobRecord, JobSpec
from jobworker.model.summary import summarize
from jobworker.regular_file import open_regular
from jobworker.serialization.convert import structure, unstructure
from jobworker.serialization.json_text import dumps, loads

_NO_SPEC = JobSpec(command=("unknown",))
_NO_SPEC_JSON = unstructure(_NO_SPEC)
_BLOCK_BYTES = 4096
_TAIL_BYTES = 4 * _BLOCK_BYTES
_RESERVED_BYTES = 3072
"""Room for what is still to be told: each line has some 600 bytes and MAX_DETAIL at the most."""
_MAX_DETAIL = 1024
_REFUSED = b'{"refused":true}'
"""The line of a job whose client was told that there is none."""
_MANY_BYTES = 1 << 16
"""Of lines behind the first: whoever asks for something again and again makes no note grow. A line
takes a tenth of it at most."""


def make_note(spools: Path, record: JobRecord) -> None:
    """Make the note of a job that is being admitted, with room for its end.

    Raises OutputError where the disk has no such room.
    """
    spec = "".join(spec_pieces(record.spec, summarize(record)))
    line = f'{{"spec":{spec},{_changes(record)[1:]}\n'.encode(errors="surrogatepass")
    size = _with_room(len(line))
    with disk_errors("create"):
        note = _open(spools, record.id, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            _write_all(note, line + bytes(size - len(line)), 0)
        finally:
            os.close(note)


def write_note(spools: Path, record: JobRecord) -> None:
    """Add what `record` says to the note of its job, if there is one; raises nothing.

    None is made: another thread may be removing this one with its output.
    """
    with suppress(OSError):
        _add_to_note(spools, record.id, _changes(record).encode(errors="surrogatepass"))


def note_refusal(spools: Path, job: JobId) -> None:
    """Add to the note of a job that its client was told that there is none. Raises OutputError."""
    with disk_errors("write"):
        _add_to_note(spools, job, _REFUSED)


def _add_to_note(spools: Path, job: JobId, line: bytes) -> None:
    """Add a line, one thread at a time: two lines at a time would overwrite each other."""
    note = _open(spools, job, os.O_RDWR)
    try:
        with suppress(OSError):  # where a file system has no such lock
            fcntl.flock(note, fcntl.LOCK_EX)
        _add_line(note, line + b"\n")
    finally:
        os.close(note)


def _with_room(size: int) -> int:
    """The size of a note that has `size` bytes of lines: whole blocks, with room for more."""
    return -(-(size + _RESERVED_BYTES) // _BLOCK_BYTES) * _BLOCK_BYTES


def _changes(record: JobRecord) -> str:
    """What may change of a record, as one line of JSON."""
    detail = record.detail[:_MAX_DETAIL]
    fields = unstructure(evolve(record, spec=_NO_SPEC, detail=detail))
    del fields["spec"], fields["abridged"]
    return dumps(fields)


def _open(spools: Path, job: JobId, flags: int) -> int:
    where, way = spools / str(job), os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
    try:
        directory = os.open(where, way)
    except FileNotFoundError:  # its output was removed: the note stays until the history knows
        directory = os.open(mark_of(where), way)
    try:
        return open_regular(NOTE, flags | os.O_NOFOLLOW, dir_fd=directory)
    finally:
        os.close(directory)


def _add_line(note: int, line: bytes) -> None:
    size = os.fstat(note).st_size
    tail = os.pread(note, _TAIL_BYTES, max(0, size - _TAIL_BYTES))
    end = size - len(tail) + len(tail.rstrip(b"\0"))
    # A record that the history refuses is tried again and again: one line of it is enough.
    if os.pread(note, len(line), max(0, end - len(line))) == line:
        return
    first = _first_line_bytes(note) if end > _MANY_BYTES else 0
    try:
        if first and end - first > _MANY_BYTES:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        _write_all(note, line, end)
    except OSError:
        first = first or _first_line_bytes(note)
        if first + len(line) > size:
            raise
        keep = _with_room(first + len(line))
        if keep < size:
            os.ftruncate(note, keep)
        _write_all(note, line + bytes(max(0, min(end, keep) - first - len(line))), first)


def _first_line_bytes(note: int) -> int:
    with open(os.dup(note), "rb") as file:
        file.seek(0)
        return len(file.readline(MAX_NOTE_BYTES))


def _write_all(note: int, data: bytes, offset: int) -> None:
    rest = memoryview(data)
    while rest:
        written = os.pwrite(note, rest, offset)
        offset, rest = offset + written, rest[written:]


def read_note(spools: Path, job: JobId) -> JobRecord | None:
    """What the note of a job says last; None where there is none that can be read."""
    try:
        with open(_open(spools, job, os.O_RDONLY), "rb") as file:
            text = file.read(MAX_NOTE_BYTES).partition(b"\0")[0]
    except OSError:
        return None
    fields: dict[str, object] = {}
    found = None
    for line in text.splitlines():
        with suppress(JobworkerError, UnicodeDecodeError, TypeError, ValueError):
            fields.update(loads(line.decode()))  # type: ignore[call-overload]
            told = structure(JobRecord, fields)
            found = _with_cut(told, found or told)
    return found if found is not None and found.id == job else None


def was_refused(spools: Path, job: JobId) -> bool:
    """Whether the note of a job says that its client was told that there is none."""
    return _REFUSED in _last_lines(spools, job)


def read_news(spools: Path, record: JobRecord) -> JobRecord | None:
    """What the note of a job says last that the history knows; None where it says nothing so far.

    The request is that of `record`: the note has all of it, up to a megabyte, which is not read.
    """
    found = None
    for line in reversed(_last_lines(spools, record.id)):
        with suppress(JobworkerError, UnicodeDecodeError, TypeError, ValueError):
            fields = {**loads(line.decode()), "spec": _NO_SPEC_JSON}  # type: ignore[dict-item]
            told = structure(JobRecord, fields)
            if told.id == record.id:
                found = _with_cut(found or told, told)
    if found is None:
        return None
    return evolve(found, spec=record.spec, abridged=record.abridged)


def _with_cut(record: JobRecord, told: JobRecord) -> JobRecord:
    """The record, with the cut that another line tells: none of them is ever undone.

    A record that was on its way to the history when the cut came may stand behind it.
    """
    return evolve(record, output_cut=record.output_cut or told.output_cut)


def _last_lines(spools: Path, job: JobId) -> list[bytes]:
    """What a note says behind the request, or behind what is left of it; nothing without a note."""
    try:
        note = _open(spools, job, os.O_RDONLY)
        try:
            tail = os.pread(note, _MANY_BYTES, max(0, os.fstat(note).st_size - _MANY_BYTES))
        finally:
            os.close(note)
    except OSError:
        return []
    return tail.partition(b"\0")[0].split(b"\n")[1:]
