"""The launcher's imports: the standard library alone, and little of that."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import jobworker

SOURCE = Path(jobworker.__file__).resolve().parent.parent
FORBIDDEN = {
    *("trio", "attrs", "attr", "cattrs", "ssl", "sqlite3", "apsw", "cryptography", "OpenSSL"),
    *("threading", "asyncclick", "asyncio", "hypothesis"),
}
NOT_FOR_THE_LAUNCHER = {
    f"jobworker.{name}"
    for name in ("model", "config", "convert", "protocol", "jobs", "server", "pki", "client", "cli")
}
_TELL = "import json; print(json.dumps([sorted(sys.modules), sys.path]))"


def modules_after(statement: str) -> tuple[set[str], list[str]]:
    """What a fresh interpreter, started as the launcher's is, holds after `statement`."""
    code = f"import sys; sys.path.insert(0, {str(SOURCE)!r}); {statement}; {_TELL}"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-B", "-c", code],
        capture_output=True,
        check=True,
        env={},
        cwd="/",
        timeout=30,
    )
    modules, path = json.loads(done.stdout)
    return set(modules), path


@pytest.fixture(scope="module")
def launcher() -> tuple[set[str], list[str]]:
    return modules_after("import jobworker.sandbox.launcher.main")


def test_launcher_reaches_the_standard_library_alone(launcher: tuple[set[str], list[str]]) -> None:
    modules, path = launcher
    assert "jobworker.sandbox.launcher.main" in modules
    assert modules & FORBIDDEN == set()
    assert not any("site-packages" in entry for entry in path)
    tops = {name.partition(".")[0] for name in modules}
    assert tops - sys.stdlib_module_names == {"jobworker", "__main__"} - sys.stdlib_module_names


def test_launcher_reaches_no_layer_above_it(launcher: tuple[set[str], list[str]]) -> None:
    modules, _ = launcher
    assert modules & NOT_FOR_THE_LAUNCHER == set()


def test_threading_would_be_seen() -> None:
    modules, _ = modules_after("import threading")
    assert modules & FORBIDDEN == {"threading"}
