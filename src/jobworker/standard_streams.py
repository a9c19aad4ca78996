"""The descriptors 0 to 2, which a program may be started without.

A program whose standard error is closed (`2>&-`) gets the number 2 for the next file that it
opens. What then writes to standard error writes into that file: a lock, a socket, a database.

Standard library only: the launcher needs it too.
"""

import os


def fill_standard_streams() -> None:
    """Open those that are closed on /dev/null. Call it before anything else is opened."""
    while True:
        descriptor = os.open(os.devnull, os.O_RDWR)  # the lowest that is free; open(2)
        if descriptor > 2:
            os.close(descriptor)
            return
        os.set_inheritable(descriptor, True)  # as standard streams are: a child is to have them
