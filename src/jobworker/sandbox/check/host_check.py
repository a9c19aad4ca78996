"""Ask this host what it can do: run `sandbox.check.main` beside us and take its findings.

Nothing of the probes happens in the asking process. The program that tries is told what is
wanted, and ends by itself; one that hangs is killed, and what it did not tell is told as missing.
"""

import subprocess
import sys
from pathlib import Path

import trio

import jobworker
from jobworker.sandbox.check.main import Wanted, finding_from, wanted_text
from jobworker.sandbox.check.probing import Finding

SECONDS = 120
_SOURCE = str(Path(jobworker.__file__).resolve().parent.parent)
_BOOTSTRAP = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from jobworker.sandbox.check.main import main; main()"
)


async def findings(wanted: Wanted) -> list[Finding]:
    """Everything that the probes found, in their order; never raises for what the host lacks."""
    done = None
    with trio.move_on_after(SECONDS):
        done = await trio.run_process(
            [sys.executable, "-I", "-S", "-B", "-c", _BOOTSTRAP, _SOURCE],
            stdin=wanted_text(wanted).encode(),
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
    if done is None:
        return [_broken(f"no end of it within {SECONDS} s")]
    found = [finding_from(line) for line in done.stdout.decode().splitlines()]
    return found if done.returncode == 0 else [*found, _broken(_last_words(done))]


def _last_words(done: "subprocess.CompletedProcess[bytes]") -> str:
    said = done.stderr.decode(errors="replace").strip().splitlines()
    return f"exit code {done.returncode}: {said[-1] if said else 'it said nothing'}"


def _broken(reason: str) -> Finding:
    return Finding("processes", "the probes themselves", False, True, reason, "")
