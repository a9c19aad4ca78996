"""How a program ends that lacks what it needs: one line with the remedy."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
WITHOUT_APSW = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "apsw":
            raise ModuleNotFoundError("No module named 'apsw'", name="apsw")
sys.meta_path.insert(0, Hidden())
from jobworker.cli.worker.main import main
main()
"""


@pytest.mark.parametrize("command", ["serve", "launcher --socket=/x", "check", "audit", "prune"])
def test_server_without_its_extra_says_what_to_install(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_APSW, *command.split()],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    (line,) = done.stderr.splitlines()
    assert line.startswith("worker: cannot do this: the Python module apsw")
    assert "pip install 'jobworker[server]'" in line
    assert done.returncode == 78


def test_client_commands_need_no_extra() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_APSW, "certs", "--help"], capture_output=True, check=False
    )
    assert done.returncode == 0


def test_units_run_what_the_readme_installs() -> None:
    readme = (ROOT / "README.md").read_text()
    for unit in (ROOT / "contrib").glob("*.service"):
        text = unit.read_text()
        (command,) = [line for line in text.splitlines() if line.startswith("ExecStart=")]
        assert command.removeprefix("ExecStart=").split()[0] in readme
        assert "StartLimitIntervalSec=0" in text.partition("[Service]")[0], "it is tried again"
