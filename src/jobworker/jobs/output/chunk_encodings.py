"""The encodings of a chunk, kept with the chunk so that each of them is made once.

The spool gives followers at one place the same chunk, and the server makes a message of it for each
client. A thousand clients that follow one job mostly get the same message: the first one's
subscription makes it, and the others use it again. The encodings live as long as their chunk, so
the spool's bound on recent chunks bounds them too.

This package does not know the wire protocol. A form is a name on which the readers agree. An
encoding is bytes in two parts, so that a large payload is not copied to follow its header.
"""

from collections.abc import Callable, Hashable

from attrs import define, field

Parts = tuple[bytes, bytes | bytearray]


@define(eq=False)
class ChunkEncodings:
    """The encodings of one chunk, by form."""

    _made: dict[Hashable, Parts] = field(factory=dict, init=False)

    def get(self, form: Hashable, make: Callable[[], Parts]) -> Parts:
        """The chunk in this form. Calls `make` unless an earlier reader had this form made."""
        found = self._made.get(form)
        if found is None:
            found = self._made[form] = make()
        return found
