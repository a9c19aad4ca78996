"""The users of a spool: its owner, each follower, each call in a thread.

The files are open as long as there are users. When the last one is gone, they are closed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from attrs import define, field

from jobworker.jobs.output.closing import close_files
from jobworker.jobs.output.files import OutputFiles


@define(eq=False)
class SpoolUsers:
    """Counts the users of one spool, and closes its files when the last one is gone."""

    _files: OutputFiles
    followers: int = field(default=0, init=False)
    closed: bool = field(default=False, init=False)
    """Whether the owner uses the spool no longer."""
    shut: bool = field(default=False, init=False)
    """Whether `shut_out` was called: followers do not count any more."""
    _count: int = field(default=1, init=False)
    _when_closed: Callable[[], None] | None = field(default=None, init=False)

    @property
    def any(self) -> bool:
        """Whether there are users, so the files are open."""
        return self._count > 0

    def close(self) -> None:
        """Count the owner no longer. A second call does nothing."""
        if not self.closed:
            self.closed = True
            self.release()

    def lend(self, when_closed: Callable[[], None]) -> None:
        """From now on, close the spool once nobody but its owner uses it; then call `when_closed`.

        For the spool of an ended job, whose owner is the archive.
        """
        self._when_closed = when_closed

    def add_follower(self) -> None:
        """Count one follower more."""
        self.followers += 1
        self.hold()

    def remove_follower(self) -> None:
        """Count one follower less."""
        self.followers -= 1
        if not self.shut:
            self.release()

    def shut_out(self) -> None:
        """Count no followers any more, so the files are closed once no thread uses them."""
        self.shut = True
        self.hold()
        self._count -= self.followers
        self.release()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Count one user more during the block."""
        self.hold()
        try:
            yield
        finally:
            self.release()

    def hold(self) -> None:
        """Count one user more."""
        self._count += 1

    def release(self) -> None:
        """Count one user less."""
        self._count -= 1
        if self._count == 1 and self._when_closed is not None and not self.closed:
            self.close()
        elif not self._count:
            close_files(self._files.let_go())
            when_closed, self._when_closed = self._when_closed, None  # it may refer to the spool
            if when_closed is not None:
                when_closed()
