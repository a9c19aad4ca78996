"""The output of an ended job: functions that seal it late, measure it, or remove it.

The seal in the files tells every process that the job has ended. But a full disk may have refused
the seal, and then this output has to be removed to make room. So a caller that knows that the job
has ended may say so (`ended`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from jobworker.errors import Busy
from jobworker.jobs.output.directory import NOTE, disk_errors
from jobworker.jobs.output.files import OutputFiles
from jobworker.sandbox.channel import close_all


def seal_output(directory: Path, *, ends_now: bool = False) -> None:
    """Seal the log in `directory`, if it is not sealed. Raises as `OutputFiles.open` does.

    If records would have to be cut for that, the files have become shorter since the job's end, and
    stay as they are: an administrator may put them back from a copy. Empty files stay as they are
    for the same reason, unless the job `ends_now`.
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
    """The time at which the log in `directory` ended, and the size of its files in bytes.

    The time is in nanoseconds since the epoch; 0 if no record is left that has it. `ended`: the
    caller knows that the job has ended, so the log need not be sealed. Raises NotFound if there is
    none, Busy if it is not sealed, OutputError.
    """
    with _ended_files(directory, ended) as files:
        return files.last.time_ns, files.size_on_disk()


def remove_output(
    directory: Path,
    *,
    force: bool = False,
    ended: bool = False,
    close: Callable[[Sequence[int]], None] = close_all,
) -> int:
    """Remove the log in `directory`. Returns how many bytes its files had.

    `ended`: see `describe_output`. `force`: remove it though a process reads it. `close` gets the
    files' descriptors: the last close frees the blocks, which takes a while for gigabytes. Raises
    NotFound if there is none, Busy if it is not sealed or is being read, OutputError.
    """
    with _ended_files(directory, ended) as files:
        size = files.size_on_disk()
        files.remove(directory, force=force)
        close(files.let_go())
        return size


@contextmanager
def _ended_files(directory: Path, ended: bool) -> Iterator[OutputFiles]:
    # Only this program makes notes. Beside a note stand the files of a job's output, or some of
    # them.
    with disk_errors("open", directory):
        partial = ended and (directory / NOTE).is_file()
        files = OutputFiles.look_at(directory, partial=partial)
        try:
            if not (files.sealed or ended):
                raise Busy("cannot remove the job's output: it has not ended")
            yield files
        finally:
            files.close()
