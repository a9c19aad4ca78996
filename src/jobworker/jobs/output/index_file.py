"""The index of a job's output on disk, with the records at its end that only memory has so far.

A full disk may refuse a record whose bytes are in the data file. The record then waits in memory,
and readers see it there. All methods may wait for the disk, and raise OSError or OutputError.
"""

import os
from collections.abc import Mapping
from types import MappingProxyType

from attrs import define, field

from jobworker.jobs.output.file_reads import FileReads
from jobworker.jobs.output.index import BLOCK_RECORDS, EMPTY, RECORD, Record
from jobworker.model.job import Stream


@define(eq=False)
class IndexFile:
    """The open index of one job. `records` and `last` describe the log that can be read."""

    fd: int
    _reads: FileReads
    _log: tuple[int, Record] = field(default=(0, EMPTY), init=False)
    """The number of records and the last one. One tuple, since readers in other threads must see
    both change together."""
    _unwritten: Mapping[int, Record] = field(default=MappingProxyType({}), init=False)
    """The log's last records that the index does not have, by number. A writer replaces the mapping
    and never changes it. A reader reads `records` first: a record below that number is either here
    or in the index."""
    cut_records: int = field(default=0, init=False)
    """How many records at the end of the file are not part of the log: they do not follow their
    predecessor, or the data files have fewer bytes."""

    @property
    def records(self) -> int:
        """The number of records of the log."""
        return self._log[0]

    @property
    def last(self) -> Record:
        """The state of the log as readers can see it."""
        return self._log[1]

    def load(self, sizes: Mapping[Stream, int]) -> tuple[Record, bool]:
        """Find the last valid record: it follows its predecessor, and its data is there.

        `sizes`: the sizes of the data files. Returns the last record that follows its predecessor,
        whether its data is there or not, and whether the last valid record is the seal.
        """
        number = os.fstat(self.fd).st_size // RECORD.size
        found, sealed = number, False
        record = self.record(number - 1)
        told = EMPTY
        while number:
            before = self.record(number - 2)
            if record.follows(before):
                told = told if told.time_ns else record
                if all(record.length_of(stream) <= sizes[stream] for stream in Stream):
                    sealed = record.seals(before)
                    break
            number, record = number - 1, before
        self._log = (number, record)
        self.cut_records = found - number
        return told, sealed

    def cut_seal(self) -> None:
        """Remove the seal, which is the last record, from the log. The file keeps it for now."""
        number = self.records - 2
        self._log = (number + 1, self.record(number))

    def truncate(self) -> None:
        """Cut the file off after the last record of the log."""
        os.ftruncate(self.fd, self.records * RECORD.size)

    # --- writing ----------------------------------------------------------------------------

    def add(self, record: Record) -> None:
        """Add a record to the log. It stays in memory until `flush`."""
        self._unwritten = {**self._unwritten, self.records: record}
        self._log = (self.records + 1, record)

    def flush(self) -> None:
        """Write the records that are in memory to the file."""
        for number, record in self._unwritten.items():
            self._put(number, record)
        if self._unwritten:
            self._unwritten = {}

    def write(self, record: Record) -> None:
        """Write a record to the file and add it to the log. If that fails, it is in neither.

        The file must have all records before it (`flush`).
        """
        self._put(self.records, record)
        self._log = (self.records + 1, record)

    def _put(self, number: int, record: Record) -> None:
        # At an explicit offset: after a short write the next attempt overwrites the torn record.
        packed = record.pack()
        done = 0
        while done < RECORD.size:
            done += os.pwrite(self.fd, packed[done:], number * RECORD.size + done)

    # --- reading ----------------------------------------------------------------------------

    def record(self, number: int, *, nowait: bool = False) -> Record:
        """Record `number` of the log; number -1 is the empty state before the first one.

        `nowait`: see `FileReads.read`.
        """
        if number < 0:
            return EMPTY
        if (record := self._unwritten.get(number)) is not None:
            return record
        offset = number * RECORD.size  # a record is never in two pages, so it is read whole
        return Record(*RECORD.unpack(self._reads.read(self.fd, RECORD.size, offset, nowait=nowait)))

    def block(self, first: int, *, nowait: bool) -> bytes | bytearray:
        """The bytes of at most `BLOCK_RECORDS` records from number `first` on.

        `nowait`: see `FileReads.read`. The last record may be cut off then.
        """
        records, unwritten = self.records, self._unwritten
        count = min(BLOCK_RECORDS, min(unwritten, default=records) - first)
        if count > 0:
            size, offset = count * RECORD.size, first * RECORD.size
            return self._reads.read(self.fd, size, offset, nowait=nowait)
        return b"".join(unwritten[number].pack() for number in range(first, records))
