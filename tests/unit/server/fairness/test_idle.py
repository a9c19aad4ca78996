"""The service's start loads no test framework, though Trio's testing module would."""

import subprocess
import sys

import pytest

FIRST = "import sys, jobworker.server.service, trio.testing; "


@pytest.mark.parametrize("before", ["", "import pytest; "])
def test_service_imports_pytest_where_somebody_else_has_alone(before: str) -> None:
    program = f"{before}{FIRST} print('_pytest' in sys.modules, 'pytest' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout.decode().split() == 2 * [str(bool(before))]
