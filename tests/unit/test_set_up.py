"""What `make demo` and `make test` ask this machine for."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = (ROOT / "contrib" / "set-up.sh").read_text()


def test_demonstration_needs_what_the_product_needs() -> None:
    product = SCRIPT.partition("# For jobworker itself")[2].partition("extra=server")[0]
    needed = re.findall(r"need .* (\S+)$", product, re.MULTILINE)
    assert set(needed) == {"procps", "libseccomp2", "python3-minimal", "e2fsprogs"}
    assert "need " not in SCRIPT.partition("extra=server")[2], "what tests use may be missing"


def test_newer_node_is_not_said_to_be_missing() -> None:
    if shutil.which("node") is None:
        pytest.skip("needs node")
    (check,) = re.findall(r"use '(node .*)' nodejs", SCRIPT)
    version = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True)
    done = subprocess.run(["sh", "-c", check], capture_output=True, check=False)
    new_enough = int(version.stdout.removeprefix("v").partition(".")[0]) >= 18
    assert (done.returncode == 0) == new_enough, done.stderr
