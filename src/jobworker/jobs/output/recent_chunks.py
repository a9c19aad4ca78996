"""The chunks that followers of one spool have read last, for followers that come to the same place.

Many followers read the same output at almost the same time. They all get the same LogChunk object,
so the disk is read once, and the server encodes the chunk once (`output.chunk_encodings`).
"""

from collections.abc import Hashable

from attrs import define, field, frozen

from jobworker.jobs.output.index import LogChunk, Place, ReadFilter

RECENT_BYTES, MAX_RECENT = 1 << 20, 256
"""The bounds on the recent chunks of a spool: their bytes, and their number."""


@frozen
class _Recent:
    """The chunk that was read at a place, and the place after it."""

    chunk: LogChunk
    after: Place
    was_all: bool
    """Whether the log ended with the chunk when it was read."""


@define(eq=False)
class RecentChunks:
    """The recent chunks of one spool, by place and filter, in the order in which they were read."""

    _chunks: dict[Hashable, _Recent] = field(factory=dict, init=False)
    _bytes: int = field(default=0, init=False)

    def get(self, place: Place, view: ReadFilter, log_bytes: int) -> tuple[LogChunk, Place] | None:
        """The recent chunk at a place, and the place after it; None if the files must be read.

        `log_bytes`: the present size of the log. If the log ended with the chunk, and has doubled
        its length from there since, the place is to be read again: a late follower would otherwise
        get as many small chunks as the first one, and stay late.
        """
        found = self._chunks.get(_key(place, view))
        if found is None or len(found.chunk.data) > view.max_bytes:
            return None
        size = len(found.chunk.data)
        has_doubled = found.was_all and log_bytes - found.chunk.end >= size
        if has_doubled and view.coalesce and 2 * size <= view.max_bytes:
            return None
        return found.chunk, found.after

    def put(
        self, place: Place, view: ReadFilter, chunk: LogChunk, after: Place, log_bytes: int
    ) -> None:
        """Keep a chunk that was read at `place`, when the log had `log_bytes` bytes."""
        key = _key(place, view)
        if (before := self._chunks.pop(key, None)) is not None:
            self._bytes -= len(before.chunk.data)
        self._chunks[key] = _Recent(chunk, after, chunk.end >= log_bytes)
        self._bytes += len(chunk.data)
        while self._bytes > RECENT_BYTES or len(self._chunks) > MAX_RECENT:
            oldest = self._chunks.pop(next(iter(self._chunks)))
            self._bytes -= len(oldest.chunk.data)

    def clear(self) -> None:
        """Forget all chunks."""
        self._chunks.clear()
        self._bytes = 0


def _key(place: Place, view: ReadFilter) -> Hashable:
    return place, view.streams, view.coalesce, view.starts
