"""Make sure that descriptors 0 to 2 are open: a program may be started without them.

A program whose standard error is closed (`2>&-`) gets descriptor 2 for the next file that it opens.
A later write to standard error then goes into that file: a lock, a socket, a database.

Standard library only: the launcher needs it too.
"""

import os


def fill_standard_streams() -> None:
    """Open /dev/null for each of descriptors 0 to 2 that is closed. Call it before any open."""
    while True:
        descriptor = os.open(os.devnull, os.O_RDWR)  # gets the lowest free number; open(2)
        if descriptor > 2:
            os.close(descriptor)
            return
        os.set_inheritable(descriptor, True)  # children inherit standard streams
