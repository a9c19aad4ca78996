"""User namespaces that cannot be made leave nothing behind."""

import errno
import os

import pytest

from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.user_namespaces import make_user_namespace

from ...descriptors import descriptors


def test_user_namespace_that_no_process_can_make_leaves_no_descriptor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_: int) -> None:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(sc, "clone3", refuse)
    before = descriptors()
    with pytest.raises(BlockingIOError):
        make_user_namespace(100_000, 1)
    assert descriptors() == before
