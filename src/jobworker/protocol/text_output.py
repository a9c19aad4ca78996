"""Output as text: a job's bytes decoded from UTF-8 for who only wants to read them, sans-IO.

A character whose bytes are torn apart by two pieces of its stream comes whole with the later
one, and what is no UTF-8 becomes U+FFFD, one for each maximal part (Unicode 15, section 3.9). So
a piece may hold no text yet, and `bytes` says how many of the job's bytes it stands for. Whoever
needs the exact bytes asks for one of the other encodings.
"""

import codecs

from attrs import define, evolve, field

from jobworker.convert import unstructure
from jobworker.json_text import dumps
from jobworker.model.job import Stream
from jobworker.protocol.messages import OutputHeader
from jobworker.protocol.methods import OUTPUT

_make_decoder = codecs.getincrementaldecoder("utf-8")


@define(eq=False)
class TextOutput:
    """The messages of one subscription, in order."""

    _decoders: dict[Stream, codecs.IncrementalDecoder] = field(factory=dict, init=False)
    _last: dict[Stream, OutputHeader] = field(factory=dict, init=False)

    def encode(self, header: OutputHeader, data: bytes) -> str:
        """The message for a piece of output."""
        decoder = self._decoders.setdefault(header.stream, _make_decoder("replace"))
        self._last[header.stream] = header
        return _message(header, decoder.decode(data), len(data))

    def flush(self, offset: int) -> tuple[str, ...]:
        """The messages for what no later piece will complete; `offset` is the output's end."""
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
