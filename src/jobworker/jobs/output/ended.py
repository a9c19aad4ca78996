"""What becomes of a job's output after its end: sealed late, measured, removed.

The seal in the files says that a job has ended, to every process alike. The service knows it by
itself, and may say so (`ended`): a full disk can have refused the seal, and then this output must
go for there to be room.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jobworker.errors import Busy
from jobworker.jobs.output.directory import NOTE, disk_errors
from jobworker.jobs.output.files import OutputFiles


def seal_output(directory: Path, *, ends_now: bool = False) -> None:
    """End the log in `directory` if it has not ended; raises as `OutputFiles.open` does.

    Where a record would have to be cut for that, the files have become shorter since the job's
    end, and stay as they are: they may be put back. So do empty ones, unless the job `ends_now`.
    """
    files = OutputFiles.look_at(directory)
    try:
        with disk_errors("open", directory):
            seal = files.can_be_sealed and (ends_now or files.size_on_disk() > 0)
    finally:
        files.close()
    if seal:
        files = OutputFiles.open(directory)
        try:
            files.seal()
        finally:
            files.close()


def describe_output(directory: Path, *, ended: bool = False) -> tuple[int, int]:
    """When the log in `directory` ended (ns since the epoch), and the bytes of its files.

    The time is 0 where no record is left to tell it. The log must be sealed, unless the caller
    knows that it has `ended`. Raises NotFound, Busy where it is not, OutputError.
    """
    with _ended_files(directory, ended) as files:
        return files.last.time_ns, files.size_on_disk()


def remove_output(directory: Path, *, force: bool = False, ended: bool = False) -> int:
    """Remove the log in `directory`: the bytes that its files had. `ended`: `describe_output`.

    Raises NotFound, Busy where it has not ended or somebody reads it (if not forced), OutputError.
    """
    with _ended_files(directory, ended) as files:
        size = files.size_on_disk()
        files.remove(directory, force=force)
        return size


@contextmanager
def _ended_files(directory: Path, ended: bool) -> Iterator[OutputFiles]:
    # A note is ours alone: where one stands, so does a job's output, or what is left of it.
    with disk_errors("open", directory):
        partial = ended and (directory / NOTE).is_file()
        files = OutputFiles.look_at(directory, partial=partial)
        try:
            if not (files.sealed or ended):
                raise Busy("cannot remove the job's output: it has not ended")
            yield files
        finally:
            files.close()
