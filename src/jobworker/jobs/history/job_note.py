"""The note of a job: a copy of its record in a file beside its output, with room for its end.

The history counts wherever it knows as much as the note. There are two cases in which it knows
less. First, an administrator may lose the history or put an older copy back, while output and live
jobs stay. The note says whose job it was, what it ran and how it ended, so that the next service
can adopt the job (`jobs.adoption`). Second, a full disk may refuse a record after the service has
told clients of it. The note takes this record, since its room is allocated when the job is
admitted; without that room the job is refused. So a restart never changes what clients were told.

A note is a file of lines of JSON. The first line is the whole record. Each further line has the
fields that may change, that is all but the request. Zeros follow, up to the end of the reserved
room. If the room is used up and the disk gives no more, or if there are many lines, a new line
replaces all lines but the first. A line may be torn; the next one begins on a line of its own. The
service does not call fsync(2) on a note: after a power cut a note has what the file system has
kept.
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
"""Room for the lines that follow the first. A line has some 600 bytes, and up to `_MAX_DETAIL`
characters of detail."""
_MAX_DETAIL = 1024
_REFUSED = b'{"refused":true}'
"""The line that says that the service has refused the job, so its client knows of none."""
_MANY_BYTES = 1 << 16
"""The most bytes of lines after the first. So a client that changes a record again and again does
not make the note grow. A line takes a tenth of it at most."""


def make_note(spools: Path, record: JobRecord) -> None:
    """Make the note of a job that is being admitted, with room for its end.

    `spools` is the directory of all jobs' output. Raises OutputError if the disk has no such room.
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
    """Add the present state of `record` to the note of its job. Raises nothing.

    Does nothing if there is no note: another thread may just have removed it with the output.
    """
    with suppress(OSError):
        _add_to_note(spools, record.id, _changes(record).encode(errors="surrogatepass"))


def note_refusal(spools: Path, job: JobId) -> None:
    """Add to the note of a job that the service has refused the job. Raises OutputError."""
    with disk_errors("write"):
        _add_to_note(spools, job, _REFUSED)


def _add_to_note(spools: Path, job: JobId, line: bytes) -> None:
    """Add a line, one thread at a time: two lines at a time would overwrite each other."""
    note = _open(spools, job, os.O_RDWR)
    try:
        with suppress(OSError):  # the file system may have no such lock
            fcntl.flock(note, fcntl.LOCK_EX)
        _add_line(note, line + b"\n")
    finally:
        os.close(note)


def _with_room(size: int) -> int:
    """The size in bytes of a note with `size` bytes of lines: whole blocks, with the reserve."""
    return -(-(size + _RESERVED_BYTES) // _BLOCK_BYTES) * _BLOCK_BYTES


def _changes(record: JobRecord) -> str:
    """The fields of a record that may change, as one line of JSON."""
    detail = record.detail[:_MAX_DETAIL]
    fields = unstructure(evolve(record, spec=_NO_SPEC, detail=detail))
    del fields["spec"], fields["abridged"]
    return dumps(fields)


def _open(spools: Path, job: JobId, flags: int) -> int:
    where, way = spools / str(job), os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
    try:
        directory = os.open(where, way)
    except FileNotFoundError:  # the output was removed; the note stays until the history knows it
        directory = os.open(mark_of(where), way)
    try:
        return open_regular(NOTE, flags | os.O_NOFOLLOW, dir_fd=directory)
    finally:
        os.close(directory)


def _add_line(note: int, line: bytes) -> None:
    size = os.fstat(note).st_size
    tail = os.pread(note, _TAIL_BYTES, max(0, size - _TAIL_BYTES))
    end = size - len(tail) + len(tail.rstrip(b"\0"))
    # The service tries again and again to store a record that the history refuses. One line of it
    # is enough.
    if os.pread(note, len(line), max(0, end - len(line))) == line:
        return
    first = _first_line_bytes(note) if end > _MANY_BYTES else 0
    try:
        if first and end - first > _MANY_BYTES:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        _write_all(note, line if _begins_a_line(note, end) else b"\n" + line, end)
    except OSError:
        first = first or _first_line_bytes(note)
        size = os.fstat(note).st_size  # the part that was written may have made the note longer
        if first + len(line) > size:
            raise
        keep = _with_room(first + len(line))
        if keep < size:
            os.ftruncate(note, keep)
        # Zeros up to the end: a part of the line may stand behind all that was there before.
        _write_all(note, line + bytes(min(size, keep) - first - len(line)), first)


def _begins_a_line(note: int, offset: int) -> bool:
    return offset == 0 or os.pread(note, 1, offset - 1) == b"\n"


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
    """The record of a job by its note, with all changes; None without a readable note."""
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
    """Whether the note of a job says that the service has refused the job."""
    return _REFUSED in _last_lines(spools, job)


def read_news(spools: Path, record: JobRecord) -> JobRecord | None:
    """The record of a job by the last whole line of its note; None if only the first line is there.

    The request comes from `record`. The note has the whole request too, up to a megabyte, which
    this function does not read.
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
    """The record, with the cut of another line of the note: a cut is never undone.

    A line of a record that was on its way to the history at the time of the cut may follow the
    line with the cut.
    """
    return evolve(record, output_cut=record.output_cut or told.output_cut)


def _last_lines(spools: Path, job: JobId) -> list[bytes]:
    """The lines after the first of a note, or of its last `_MANY_BYTES`; [] without a note."""
    try:
        note = _open(spools, job, os.O_RDONLY)
        try:
            tail = os.pread(note, _MANY_BYTES, max(0, os.fstat(note).st_size - _MANY_BYTES))
        finally:
            os.close(note)
    except OSError:
        return []
    return tail.partition(b"\0")[0].split(b"\n")[1:]
