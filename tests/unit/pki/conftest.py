"""Directories that go with their tests, and the sets of certificates made in them.

pytest's own `tmp_path` outlives the run, and here it would keep private keys; so these tests have
one that is removed whether they pass or fail.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobworker.pki.administration import init_authority

from .certificates import NOW
from .handshakes import Site, make_site


def passing_directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="jobworker-test-") as name:
        yield Path(name)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    yield from passing_directory()


@pytest.fixture(scope="module")
def made() -> Iterator[Path]:
    """A full set as of the fixed `NOW`."""
    for directory in passing_directory():
        init_authority(directory, ["worker1.example.org", "192.0.2.7"], now=NOW)
        yield directory


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    for directory in passing_directory():
        yield make_site(directory)


@pytest.fixture(scope="module")
def stranger() -> Iterator[Site]:
    for directory in passing_directory():
        yield make_site(directory)
