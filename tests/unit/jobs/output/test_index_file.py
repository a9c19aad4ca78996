"""The index on disk, with the records that only memory has so far."""

from pathlib import Path

from jobworker.jobs.output.files import OutputFiles

from .written_logs import MERGED, PIECES, joined, no_descriptor_leaks, read_all, written

__all__ = ["no_descriptor_leaks"]


def test_zeroes_after_a_power_cut_are_no_records(tmp_path: Path) -> None:
    with written(tmp_path / "job"):
        pass
    with (tmp_path / "job" / "index").open("r+b") as index:
        index.truncate(4096)
    files = OutputFiles.open(tmp_path / "job")
    assert files.records == len(PIECES)
    assert joined(read_all(files)) == MERGED
    files.close()
