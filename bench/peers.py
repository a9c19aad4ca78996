"""Other programs that start a command in isolation, each timed from posix_spawn(3) on.

All run `/usr/bin/echo x` in the environment that a job finds, so that the C library has the same
locale to load:

    posix_spawn   nothing around it
    bwrap         namespaces, read-only /usr, /proc, /dev; no limits, no filter
    crun          an OCI bundle with a read-only root; no limits (its cgroup manager is off,
                  since it does not take hybrid hierarchies)
    runc          the same bundle, with control groups
    firejail      its own idea of a sandbox, without a profile
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.start.plan import ENVIRONMENT

ECHO = ["/usr/bin/echo", "x"]
BWRAP = [
    *("bwrap", "--unshare-all", "--share-net", "--die-with-parent", "--new-session"),
    *("--ro-bind", "/usr", "/usr", "--symlink", "usr/lib", "/lib"),
    *("--symlink", "usr/lib64", "/lib64", "--symlink", "usr/bin", "/bin"),
    *("--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"),
]
FIREJAIL = ["firejail", "--quiet", "--noprofile"]

Timer = Callable[[], tuple[float, float]]
"""Seconds to the first output byte, and to the end."""


def time_process(argv: list[str], cwd: str | None = None) -> tuple[float, float]:
    """Seconds to the first byte and to the end of a program."""
    began = time.perf_counter()
    with subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=cwd, env=ENVIRONMENT) as process:
        assert process.stdout is not None
        first = os.read(process.stdout.fileno(), 1)
        at_first = time.perf_counter() - began
        assert first == b"x", f"{argv[0]} printed {first!r}"
        process.stdout.read()
    return at_first, time.perf_counter() - began


class Bundle:
    """An OCI bundle whose root is the host's /usr, read-only, and the two runtimes that take it.

    crun runs from a helper process in a mount namespace where it finds nothing but cgroup2.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._runs = 0
        _write_bundle(directory)
        self._crun = subprocess.Popen(
            [sys.executable, __file__, str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def crun(self) -> tuple[float, float]:
        """See `time_process`."""
        assert self._crun.stdin is not None
        assert self._crun.stdout is not None
        self._crun.stdin.write("\n")
        self._crun.stdin.flush()
        first, whole = map(float, self._crun.stdout.readline().split())
        return first, whole

    def runc(self) -> tuple[float, float]:
        """See `time_process`."""
        self._runs += 1
        name = f"bench-{os.getpid()}-{self._runs}"
        return time_process(["runc", "run", name], str(self._directory))

    def close(self) -> None:
        """End the helper."""
        assert self._crun.stdin is not None
        self._crun.stdin.close()
        self._crun.wait()


def _write_bundle(directory: Path) -> None:
    root = directory / "rootfs"
    for name in ("usr", "proc", "dev", "sys"):
        (root / name).mkdir(parents=True)
    for name in ("bin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    subprocess.run(["runc", "spec"], cwd=directory, check=True)
    config = json.loads((directory / "config.json").read_text())
    environment = [f"{key}={value}" for key, value in ENVIRONMENT.items()]
    config["process"].update(terminal=False, args=ECHO, env=environment)
    config["root"] = {"path": "rootfs", "readonly": True}
    config["linux"].pop("resources", None)
    usr = {
        "destination": "/usr",
        "type": "bind",
        "source": "/usr",
        "options": ["rbind", "ro"],
    }
    config["mounts"].append(usr)
    (directory / "config.json").write_text(json.dumps(config))


def _serve_crun(bundle: Path) -> None:
    """The helper: one timed run for each line of input."""
    sc.unshare(sc.CLONE_NEWNS)
    sc.mount(None, "/", None, sc.MS_REC | sc.MS_PRIVATE)
    if Path("/sys/fs/cgroup/unified").is_dir():
        sc.mount("/sys/fs/cgroup/unified", "/sys/fs/cgroup", None, sc.MS_BIND)
    for number, _ in enumerate(sys.stdin):
        name = f"bench-{os.getpid()}-{number}"
        argv = ["crun", "--cgroup-manager=disabled", "run", name]
        first, whole = time_process(argv, str(bundle))
        print(first, whole, flush=True)


if __name__ == "__main__":
    _serve_crun(Path(sys.argv[1]))
