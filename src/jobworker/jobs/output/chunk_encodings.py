"""What the readers of a chunk have made of it, kept with the chunk so that each form is made once.

The spool gives followers at one place the same chunk, and a client's message is made of each. A
thousand clients that follow one job mostly want the same message: the first one makes it, and the
others take it. What was made goes with the chunk, so the spool's bound on recent chunks is the
bound here, too.

This room knows no wire. A form is a name upon which its readers agree, and what is kept is bytes in
two parts, so that a large one need not be copied behind its header.
"""

from collections.abc import Callable, Hashable

from attrs import define, field

Parts = tuple[bytes, bytes | bytearray]


@define(eq=False)
class ChunkEncodings:
    """The forms of one chunk."""

    _made: dict[Hashable, Parts] = field(factory=dict, init=False)

    def get(self, form: Hashable, make: Callable[[], Parts]) -> Parts:
        """The chunk in this form: what `make` answers, unless an earlier reader has had it made."""
        found = self._made.get(form)
        if found is None:
            found = self._made[form] = make()
        return found
