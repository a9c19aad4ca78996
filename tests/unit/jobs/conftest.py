"""What several tests of jobs stand on."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def ordinary_directory() -> Iterator[Path]:
    """A directory of an ordinary user's, who the test runs as: modes do not bind root."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        if user == 0:
            os.chown(directory, 65534, 65534)
            os.seteuid(65534)
        try:
            yield Path(directory)
        finally:
            os.seteuid(user)
