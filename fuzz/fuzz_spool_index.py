"""What may stand in a job's output files after a crash or another hand: it is read, or refused.

An input is the index; the data files are as long as its first bytes say. Whatever stands there,
opening and reading end, give bytes in order without gap, or raise an error of ours.
"""

import sys
import tempfile
from contextlib import suppress
from pathlib import Path

try:
    import atheris
except ImportError:  # the seeds and their mutations run without it, see tests/unit/test_fuzz.py
    atheris = None

if atheris is not None:
    with atheris.instrument_imports():
        from jobworker.errors import JobworkerError
        from jobworker.jobs.output.files import OutputFiles
        from jobworker.jobs.output.index import Place, ReadFilter
else:
    from jobworker.errors import JobworkerError
    from jobworker.jobs.output.files import OutputFiles
    from jobworker.jobs.output.index import Place, ReadFilter


def one(data: bytes) -> None:
    """Try one input; raises what must never be raised."""
    stdout, stderr, index = (data[:1] or b"\0")[0], (data[1:2] or b"\0")[0], data[2:]
    with tempfile.TemporaryDirectory(dir="/dev/shm") as made:
        directory = Path(made) / "job"
        OutputFiles.create(directory).close()
        (directory / "stdout").write_bytes(b"o" * stdout)
        (directory / "stderr").write_bytes(b"e" * stderr)
        (directory / "index").write_bytes(index)
        try:
            files = OutputFiles.open(directory)
        except JobworkerError:
            return
        try:
            with suppress(JobworkerError):
                _read(files)
        finally:
            files.close()


def _read(files: OutputFiles) -> None:
    place, seen = Place(), 0
    while place.number < files.records:
        before = place
        chunk, place = files.read(place, ReadFilter(max_bytes=50), nowait=False)
        assert place.offset > before.offset or place.number > before.number, "no way forward"
        if chunk is not None:
            assert chunk.offset == seen
            assert len(chunk.data)
            assert set(chunk.data) <= {ord("o"), ord("e")}
            seen = chunk.offset + len(chunk.data)
    for offset in {0, files.last.size // 2, files.last.size}:
        assert files.find(offset, nowait=False).offset == offset


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
