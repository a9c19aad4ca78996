"""Runs `sandbox.check.main` as a program of its own and reads its findings.

No probe runs in the calling process. The program reads its parameters from standard input and
exits when all probes have run. A program that hangs is killed, and a finding reports that.
"""

import subprocess
import sys
from pathlib import Path

import trio

import jobworker
from jobworker.sandbox.check.main import ProbeSettings, finding_from, format_probe_settings
from jobworker.sandbox.check.probing import Finding

SECONDS = 120
_SOURCE = str(Path(jobworker.__file__).resolve().parent.parent)
_BOOTSTRAP = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from jobworker.sandbox.check.main import main; main()"
)


async def findings(probe_settings: ProbeSettings) -> list[Finding]:
    """The findings of all probes, in their order.

    A finding reports what the host lacks, and also a program that fails or hangs.
    """
    done = None
    with trio.move_on_after(SECONDS):
        done = await trio.run_process(
            [sys.executable, "-I", "-S", "-B", "-c", _BOOTSTRAP, _SOURCE],
            stdin=format_probe_settings(probe_settings).encode(),
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
    if done is None:
        return [_failure(f"they did not end within {SECONDS} s")]
    found = [finding_from(line) for line in done.stdout.decode().splitlines()]
    return found if done.returncode == 0 else [*found, _failure(_last_line(done))]


def _last_line(done: "subprocess.CompletedProcess[bytes]") -> str:
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    return f"exit code {done.returncode}: {lines[-1] if lines else 'no message'}"


def _failure(reason: str) -> Finding:
    return Finding("processes", "the probes themselves", False, True, reason, "")
