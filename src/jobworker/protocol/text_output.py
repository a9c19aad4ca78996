"""Encode output as text, sans-IO: a job's bytes decoded from UTF-8, for clients that display them.

If the bytes of a character are in two pieces of its stream, the character is in the later one.
Bytes that are not UTF-8 become U+FFFD, one for each maximal subpart (Unicode 15, section 3.9). So
the text of a piece may be empty, and `bytes` is the number of the job's bytes in the piece. A
client that needs the exact bytes uses another encoding.
"""

import codecs

from attrs import define, evolve, field

from jobworker.model.job import Stream
from jobworker.protocol.messages import OutputHeader
from jobworker.protocol.methods import OUTPUT
from jobworker.serialization.convert import unstructure
from jobworker.serialization.json_text import dumps

_make_decoder = codecs.getincrementaldecoder("utf-8")


@define(eq=False)
class TextOutput:
    """Makes the messages of one subscription, in order."""

    _decoders: dict[Stream, codecs.IncrementalDecoder] = field(factory=dict, init=False)
    _last: dict[Stream, OutputHeader] = field(factory=dict, init=False)

    def encode(self, header: OutputHeader, data: bytes) -> str:
        """Make the message for a piece of output."""
        decoder = self._decoders.setdefault(header.stream, _make_decoder("replace"))
        self._last[header.stream] = header
        return _message(header, decoder.decode(data), len(data))

    def flush(self, offset: int) -> tuple[str, ...]:
        """Make the messages for incomplete characters at the output's end, at `offset`."""
        left = [(stream, made.decode(b"", final=True)) for stream, made in self._decoders.items()]
        self._decoders.clear()
        return tuple(
            _message(evolve(self._last[stream], offset=offset), text, 0)
            for stream, text in left
            if text
        )


def _message(header: OutputHeader, text: str, count: int) -> str:
    params = {**unstructure(header), "bytes": count, "text": text}
    return dumps({"jsonrpc": "2.0", "method": OUTPUT, "params": params})
