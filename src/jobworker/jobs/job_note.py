"""The note of a job beside its output: its record once more, for the case that the history is gone.

An administrator may lose the history, or put an older copy back, while output and live jobs stay.
A note says whose job it was, what it ran and how it ended, so the next service can adopt the job
(`takeover`). The history is the truth wherever it knows as much.

A note is a file of lines of JSON. The first line is the whole record; each further line has what
changed since, without the request, which does not change. The last line may be torn. The disk may
refuse a note: it is a second copy, and the job goes on without it.
"""

import os
from contextlib import suppress
from pathlib import Path

from attrs import evolve

from jobworker.convert import dumps, loads, structure, unstructure
from jobworker.errors import JobworkerError
from jobworker.jobs.output_directory import NOTE
from jobworker.jobs.spec_json import spec_pieces
from jobworker.model.job import JobId, JobRecord, JobSpec
from jobworker.model.summary import summarize

MAX_NOTE_BYTES = 16 << 20
"""More is no note of ours: a request has a megabyte of arguments, and few lines follow."""
_NO_SPEC = JobSpec(command=("unknown",))


def write_note(spools: Path, record: JobRecord, *, create: bool = False) -> None:
    """Add what `record` says to the note of its job; where that cannot be written, it is not.

    Only with `create` is a note made: another thread may be removing this one with its output.
    """
    with suppress(OSError):
        directory = os.open(spools / str(record.id), os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            flags = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            flags |= os.O_CREAT if create else 0
            note = os.open(NOTE, flags, 0o600, dir_fd=directory)
        finally:
            os.close(directory)
        try:
            _add_line(note, record)
        finally:
            os.close(note)


def _add_line(note: int, record: JobRecord) -> None:
    size = os.fstat(note).st_size
    fields = unstructure(evolve(record, spec=_NO_SPEC))
    del fields["spec"], fields["abridged"]
    text = dumps(fields)
    if not size:
        spec = "".join(spec_pieces(record.spec, summarize(record)))
        text = f'{{"spec":{spec},{text[1:]}'
    line = text.encode(errors="surrogatepass") + b"\n"
    # A record that the history refuses is tried again and again: one line of it is enough.
    if size < len(line) or os.pread(note, len(line), size - len(line)) != line:
        os.write(note, line)


def read_note(spools: Path, job: JobId) -> JobRecord | None:
    """What the note of a job says last; None where there is none that can be read."""
    try:
        directory = os.open(spools / str(job), os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            note = os.open(NOTE, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        finally:
            os.close(directory)
        with open(note, "rb") as file:
            text = file.read(MAX_NOTE_BYTES)
    except OSError:
        return None
    fields: dict[str, object] = {}
    found = None
    for line in text.splitlines():
        with suppress(JobworkerError, UnicodeDecodeError, TypeError, ValueError):
            fields.update(loads(line.decode()))  # type: ignore[call-overload]
            found = structure(JobRecord, fields)
    return found if found is not None and found.id == job else None
