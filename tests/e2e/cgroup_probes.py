"""Prove the control-group layer on this host's kernel with real processes.

Each probe takes a tree and starts processes that try to go over a limit. As a script (root, any
Linux with cgroup v2 or v1, nothing but Python's standard library):

    python3 tests/e2e/cgroup_probes.py [--parent GROUP] [DIRECTORY ON A DISK]
    systemd-run --wait --pipe -p Delegate=yes python3 …/cgroup_probes.py

it runs all of them, prints what was measured and exits with 1 if one failed.
"""

import argparse
import errno
import os
import select
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from jobworker import errors
from jobworker.sandbox.cgroup import files as cgroup_files
from jobworker.sandbox.cgroup import hierarchy as cgroups
from jobworker.sandbox.cgroup.hierarchy import JobScope, ScopeLimits, Tree

ALL = ("cpu", "memory", "io", "pids")
MIB = 1 << 20
UNLIMITED = ScopeLimits()
SOURCE = str(Path(cgroups.__file__).parents[3])
_HOG = "b = bytearray(256 << 20)"
_HOG_WITH_SIBLING = "import os; os.fork() or __import__('time').sleep(99); b = bytearray(256 << 20)"
_HOLD = "b = b'x' * (48 << 20); print(flush=True); input()"
_SPIN = "import os; os.fork(); print(flush=True)\nwhile True: pass"
_BOMB = """
import os, time
count = 0
while True:
    try:
        if os.fork() == 0:
            time.sleep(99)
    except BlockingIOError:
        break
    count += 1
print(count, flush=True)
time.sleep(99)
"""
_DAEMONS = """
import os, signal, time
for _ in range(20):
    if os.fork() == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if os.fork() == 0:
            print(os.getpid(), flush=True)
            time.sleep(99)
        os._exit(0)
while True:
    time.sleep(99)
"""
_CRASH = """
import os, subprocess, sys, time
sys.path.insert(0, sys.argv[1])
from jobworker.sandbox.cgroup import hierarchy as cgroups
tree = cgroups.open_tree(sys.argv[3].split(","), sys.argv[2])
scope = tree.create("left-behind")
child = os.fork()
if child == 0:
    scope.attach_self(cloned=False)
    os.execvp("sleep", ["sleep", "99"])
while not open(f"/proc/{child}/cmdline", "rb").read().startswith(b"sleep"):
    pass
print(child, flush=True)
time.sleep(99)
"""
_WITHOUT_PATHS = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from jobworker.sandbox.cgroup import hierarchy as cgroups
from jobworker.sandbox import syscalls
tree = cgroups.open_tree(sys.argv[3].split(","), sys.argv[2])
syscalls.unshare(syscalls.CLONE_NEWNS)
syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
syscalls.umount("/sys")
assert not os.path.exists("/sys/fs")
scope = tree.create("job")
child, _ = syscalls.clone3(0, scope.clone_fd)
if child == 0:
    scope.attach_self()
    while True:
        pass
try:
    limits = cgroups.ScopeLimits(cpu_percent=50, memory_bytes=64 << 20, io_bps=1 << 20, pids=10)
    scope.arm(limits)
    while not (scope.usage().pids and scope.usage().cpu_ns):
        pass  # until the child has attached itself
    assert scope.usage().pids == 1, scope.usage()
    scope.kill()
except BaseException:
    os.kill(child, signal.SIGKILL)
    raise
assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
scope.remove()
assert tree.sweep() == []
tree.close()
"""


def start(scope: JobScope, *command: str, read_line: bool = False) -> subprocess.Popen[bytes]:
    """Start a command inside the scope, `read_line`: and wait until it has printed a line."""
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        preexec_fn=partial(scope.attach_self, cloned=False),  # noqa: PLW1509 - one thread only
    )
    if read_line and child.stdout is not None:
        child.stdout.readline()
    return child


def python(code: str) -> tuple[str, ...]:
    """The command line for a piece of Python."""
    return sys.executable, "-I", "-S", "-c", code


@contextmanager
def job(tree: Tree, limits: ScopeLimits = UNLIMITED) -> Iterator[JobScope]:
    """A scope with limits, killed and removed at the end."""
    scope = tree.create(f"job-{time.monotonic_ns()}")
    try:
        scope.arm(limits)
        yield scope
    finally:
        scope.kill()
        wait_empty(tree, scope)
        remove_soon(scope)


@contextmanager
def ended(child: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Reap a child, killing it if need be, and close its pipes."""
    with child:
        try:
            yield child
        finally:
            child.kill()


def wait_empty(tree: Tree, scope: JobScope) -> None:
    """Wait until the processes that were there have ended; their parents may be slow to reap."""
    for top in tree.tops:
        for pid in cgroup_files.members(top, scope.name):
            wait_dead(pid)


def wait_dead(pid: int) -> None:
    """Wait until a process has ended, reaped or not; fails after 20 s."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([descriptor], [], [], 20)[0], f"process {pid} lives on"
    finally:
        os.close(descriptor)


def remove_soon(scope: JobScope) -> None:
    """Remove a scope whose processes have ended: the kernel lets go of it a moment later."""
    end = time.monotonic() + 20
    while True:
        try:
            scope.remove()
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > end:
                raise
            time.sleep(0.005)
        else:
            return


def is_readable(descriptor: int) -> bool:
    """Whether there is something to read now."""
    return bool(select.select([descriptor], [], [], 0)[0])


def memory_hog_is_killed(tree: Tree, _: Path) -> str:
    """A job over its memory limit is killed, counted, and announced."""
    with job(tree, ScopeLimits(memory_bytes=64 * MIB)) as scope:
        if scope.oom_fd is not None:
            assert not is_readable(scope.oom_fd)
        with ended(start(scope, *python(_HOG))) as child:
            assert child.wait(60) == -9
        usage = scope.usage()
        assert scope.oom_kills() == usage.oom_kills == 1
        assert 60 * MIB < usage.memory_peak_bytes <= 64 * MIB, usage
        if scope.oom_fd is not None:
            assert is_readable(scope.oom_fd)
            scope.clear_oom()
            assert not is_readable(scope.oom_fd)
            scope.clear_oom()
        assert scope.is_over_limit(), "it was the job's own limit"
    return f"peak {usage.memory_peak_bytes} of {64 * MIB} bytes"


def oom_ends_the_whole_job(tree: Tree, _: Path) -> str:
    """On v2 the kernel ends all processes of the job, not only the one that asked for too much."""
    if tree.kind != "v2":
        return "not on v1: the launcher does it"
    with (
        job(tree, ScopeLimits(memory_bytes=64 * MIB)) as scope,
        ended(start(scope, *python(_HOG_WITH_SIBLING))) as child,
    ):
        assert child.wait(60) == -9
        return f"oom_kills {scope.oom_kills()}"


def two_spinners_get_half_a_core(tree: Tree, _: Path) -> str:
    """The CPU limit is one for the job, however many processes it has."""
    with (
        job(tree, ScopeLimits(cpu_percent=50)) as scope,
        ended(start(scope, *python(_SPIN))) as child,
    ):
        assert child.stdout is not None
        child.stdout.readline()
        child.stdout.readline()
        for _attempt in range(20):  # a busy host may give them less than their limit, for a while
            before, started = scope.usage(), time.monotonic()
            time.sleep(2)  # the time that is measured
            after, seconds = scope.usage(), time.monotonic() - started
            percent = (after.cpu_ns - before.cpu_ns) / seconds / 1e7
            throttled = after.throttled_ns - before.throttled_ns
            assert percent <= 55, percent
            if throttled > 0:
                break
        assert throttled > 0, throttled
        assert after.pids == 2, after
        return f"{percent:.1f} % of a core, throttled for {throttled / 1e9:.2f} s"


def _dd(scope: JobScope, *arguments: str) -> float:
    started = time.monotonic()
    with ended(start(scope, "dd", *arguments)) as child:
        assert child.wait(90) == 0
    return time.monotonic() - started


def direct_io_is_throttled(tree: Tree, directory: Path) -> str:
    """Writes and reads past the page cache run at the limit, each for itself."""
    target = directory / "direct"
    with job(tree, ScopeLimits(io_bps=MIB)) as scope:
        write = _dd(scope, "if=/dev/zero", f"of={target}", "bs=128k", "count=24", "oflag=direct")
        read = _dd(scope, f"if={target}", "of=/dev/null", "bs=128k", "count=24", "iflag=direct")
        usage = scope.usage()
    target.unlink()
    assert 3 * MIB <= usage.write_bytes < 3.5 * MIB, usage
    assert 3 * MIB <= usage.read_bytes < 8 * MIB, usage  # dd itself may have to be read, too
    assert 0.75 <= usage.write_bytes / write / MIB <= 1.25, (usage, write)
    assert 0.75 <= usage.read_bytes / read / MIB <= 1.25, (usage, read)
    return f"3 MiB at 1 MiB/s: written in {write:.2f} s, read in {read:.2f} s"


def without_limit_io_is_fast(tree: Tree, directory: Path) -> str:
    """The control for the probe above: the same write without a limit, in a fresh scope."""
    target = directory / "control"
    with job(tree) as scope:
        seconds = _dd(scope, "if=/dev/zero", f"of={target}", "bs=128k", "count=24", "oflag=direct")
    target.unlink()
    assert seconds < 2, seconds
    return f"{seconds:.2f} s"


def buffered_writes_are_throttled(tree: Tree, directory: Path) -> str:
    """On v2 the page cache does not hide a write from its limit."""
    if tree.kind != "v2":
        return "not on v1: " + next(note for note in tree.missing_features() if "buffered" in note)
    target = directory / "buffered"
    with job(tree, ScopeLimits(io_bps=MIB)) as scope:
        seconds = _dd(scope, "if=/dev/zero", f"of={target}", "bs=128k", "count=24", "conv=fsync")
        usage = scope.usage()
    target.unlink()
    assert usage.write_bytes >= 3 * MIB, usage
    assert seconds >= 2, seconds
    return f"3 MiB at 1 MiB/s: {seconds:.2f} s"


def fork_bomb_stops_at_its_limit(tree: Tree, _: Path) -> str:
    """fork(2) fails with EAGAIN inside, and the host goes on; kill ends them all."""
    with (
        job(tree, ScopeLimits(pids=25)) as scope,
        ended(start(scope, *python(_BOMB))) as child,
    ):
        assert child.stdout is not None
        assert int(child.stdout.readline()) == 24
        assert scope.usage().pids == 25
        scope.kill()
        assert child.wait(20) == -9
        wait_empty(tree, scope)
        assert scope.usage().pids <= 25
        return "24 forks of 25"


def scopes_leave_the_host_its_part(tree: Tree, _: Path) -> str:
    """All scopes together have a bound, however many there are; it is a part of the host's."""
    top = tree.by_controller["pids"]
    usual = cgroup_files.read(top, "pids.max").strip()
    numbers, threads = (
        int(Path(f"/proc/sys/kernel/{name}").read_text()) for name in ("pid_max", "threads-max")
    )
    most = min(numbers // 3, threads)
    assert int(usual) == most - most // 8, usual
    try:
        tree.bound_processes(40)
        with (
            job(tree, ScopeLimits(pids=25)) as first,
            ended(start(first, *python(_BOMB))) as one,
        ):
            assert one.stdout is not None
            assert int(one.stdout.readline()) == 24
            with (
                job(tree, ScopeLimits(pids=25)) as second,
                ended(start(second, *python(_BOMB))) as other,
            ):
                assert other.stdout is not None
                assert int(other.stdout.readline()) == 14
        return "25 and 15 of 40"
    finally:
        tree.bound_processes(int(usual))


def kill_reaches_daemons(tree: Tree, _: Path) -> str:
    """Processes that left session and parent and ignore SIGTERM are killed all the same."""
    with job(tree) as scope, ended(start(scope, *python(_DAEMONS))) as child:
        assert child.stdout is not None
        pids = [int(child.stdout.readline()) for _ in range(20)]
        assert set(pids) <= cgroup_files.members(tree.tops[-1], scope.name)
        scope.kill()
        assert child.wait(20) == -9
        for pid in pids:
            wait_dead(pid)
        remove_soon(scope)
        scope.remove()
        return f"{len(pids)} daemons"


def a_busy_scope_is_not_removed(tree: Tree, _: Path) -> str:
    """remove() says that a process is left, and works after its end."""
    with job(tree) as scope, ended(start(scope, "sleep", "99")):
        try:
            scope.remove()
        except OSError as error:
            return str(error)
        raise AssertionError("removed under a process")


def charged_memory_refuses_a_lower_limit(tree: Tree, _: Path) -> str:
    """A limit below what is charged is an error at once, and kills nobody."""
    with (
        job(tree) as scope,
        ended(start(scope, *python(_HOLD), read_line=True)) as child,
    ):
        refusal = None
        try:
            scope.arm(ScopeLimits(memory_bytes=8 * MIB))
        except errors.SandboxError as error:
            refusal = error
        assert refusal is not None
        assert refusal.data == {"step": "limits"}
        assert "bytes are charged to the scope already" in str(refusal), refusal
        assert child.poll() is None
        assert scope.oom_kills() == 0
        return str(refusal)


def zero_lifts_every_limit(tree: Tree, _: Path) -> str:
    """arm() with zeros after arm() with limits leaves no limit."""
    names = (
        ("cpu.max", "memory.max", "memory.swap.max", "io.max", "pids.max")
        if tree.kind == "v2"
        else (
            "cpu.cfs_quota_us",
            "memory.limit_in_bytes",
            "memory.memsw.limit_in_bytes",
            "blkio.throttle.read_bps_device",
            "blkio.throttle.write_bps_device",
            "pids.max",
        )
    )

    def texts(scope: JobScope) -> list[str]:
        paths = [(top, f"{scope.name}/{name}") for top in tree.tops for name in names]
        return [cgroup_files.read(*path) for path in paths if cgroup_files.exists(*path)]

    with job(tree) as scope:
        fresh = texts(scope)
        scope.arm(ScopeLimits(50, 64 * MIB, MIB, 10))
        armed = texts(scope)
        assert len(fresh) >= 4
        assert all(one != other for one, other in zip(fresh, armed, strict=True)), armed
        scope.arm_ahead(ScopeLimits(20, 32 * MIB, MIB // 2, 5))
        guessed = texts(scope)
        assert all(one != other for one, other in zip(guessed, armed, strict=True)), guessed
        scope.arm(ScopeLimits(20, 32 * MIB, MIB // 2, 5))
        assert texts(scope) == guessed
        scope.arm_ahead(ScopeLimits(50, 64 * MIB, MIB, 10))
        scope.arm(ScopeLimits())
        assert texts(scope) == fresh
    return f"{len(fresh)} files"


def counting_starts_at_arm(tree: Tree, directory: Path) -> str:
    """What a spare did before its job is not the job's usage."""
    with job(tree) as scope:
        _dd(scope, "if=/dev/zero", f"of={directory / 'spare'}", "bs=1M", "count=2", "oflag=direct")
        with ended(start(scope, *python(_HOLD), read_line=True)):
            pass
        before = scope.usage()
        assert before.cpu_ns > 0
        assert before.memory_peak_bytes > 48 * MIB, before
        assert before.write_bytes >= 2 * MIB, before
        scope.arm(ScopeLimits())
        after = scope.usage()
        assert (after.cpu_ns, after.read_bytes, after.write_bytes) == (0, 0, 0), after
        version = tuple(int(part) for part in os.uname().release.split(".")[:2])
        if tree.kind != "v2" or version >= (6, 12):
            assert after.memory_peak_bytes < 24 * MIB, after
        peaks = f"peak {before.memory_peak_bytes}, then {after.memory_peak_bytes}"
        return f"{before.cpu_ns} ns, {before.write_bytes} bytes, then 0; {peaks}"


def a_crashed_instance_is_swept(tree: Tree, _: Path) -> str:
    """The next instance of the same name kills and removes what a killed one has left."""
    name = f"{tree.name}-crash"
    arguments = (SOURCE, name, ",".join(ALL))
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _CRASH, *arguments], stdout=subprocess.PIPE
    ) as crashed:
        assert crashed.stdout is not None
        pid = int(crashed.stdout.readline())
        crashed.kill()
    with open(f"/proc/{pid}/cmdline", "rb") as cmdline:
        assert cmdline.read().startswith(b"sleep")
    again = cgroups.open_tree(ALL, name)
    mine = again.create("mine")
    assert again.sweep() == ["left-behind"]
    wait_dead(pid)
    mine.remove()
    again.close()
    assert leftovers(name) == []
    return f"process {pid} is gone"


def descriptors_are_enough(tree: Tree, _: Path) -> str:
    """A whole life of a job in a mount namespace without /sys, born by CLONE_INTO_CGROUP."""
    arguments = (SOURCE, f"{tree.name}-blind", ",".join(ALL))
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _WITHOUT_PATHS, *arguments],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert leftovers(f"{tree.name}-blind") == []
    return "create to close"


def nothing_is_leaked(tree: Tree, _directory: Path) -> str:
    """Fifty scopes later there are as many descriptors as before."""
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        with job(tree, ScopeLimits(50, 64 * MIB, MIB, 10)) as scope:
            scope.usage()
    assert len(os.listdir("/proc/self/fd")) == before
    return f"{before} descriptors"


def leftovers(name: str) -> list[str]:
    """Directories of this name anywhere in the mounted hierarchies."""
    return [path for path, _, _ in os.walk("/sys/fs/cgroup") if path.split("/")[-1] == name]


PROBES: tuple[Callable[[Tree, Path], str], ...] = (
    memory_hog_is_killed,
    oom_ends_the_whole_job,
    two_spinners_get_half_a_core,
    direct_io_is_throttled,
    without_limit_io_is_fast,
    buffered_writes_are_throttled,
    fork_bomb_stops_at_its_limit,
    scopes_leave_the_host_its_part,
    kill_reaches_daemons,
    a_busy_scope_is_not_removed,
    charged_memory_refuses_a_lower_limit,
    zero_lifts_every_limit,
    counting_starts_at_arm,
    a_crashed_instance_is_swept,
    descriptors_are_enough,
    nothing_is_leaked,
)


def main() -> int:
    """Run all probes and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parent", default="")
    parser.add_argument("directory", nargs="?", default="/var/tmp")
    options = parser.parse_args()
    before = len(os.listdir("/proc/self/fd"))
    membership = Path("/proc/self/cgroup").read_text(encoding="ascii")
    name = f"jobworker-probe-{os.getpid()}"
    tree = cgroups.open_tree(ALL, name, options.parent)
    sys.stdout.write(f"{tree.kind}, {leftovers(name)}, in {membership.split()}\n")
    sys.stdout.writelines(f"note: {note}\n" for note in tree.missing_features())
    failed = 0
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        for probe in PROBES:
            try:
                sys.stdout.write(f"ok      {probe.__name__}: {probe(tree, Path(directory))}\n")
            except Exception:  # noqa: BLE001 - the probes that follow shall run all the same
                failed += 1
                sys.stdout.write(f"FAILED  {probe.__name__}\n{traceback.format_exc()}")
            sys.stdout.flush()
    tree.close()
    same = membership == Path("/proc/self/cgroup").read_text(encoding="ascii")
    clean = same and leftovers(name) == [] and len(os.listdir("/proc/self/fd")) == before
    sys.stdout.write(f"{'ok      ' if clean else 'FAILED  '}nothing is left\n")
    return 1 if failed or not clean else 0


if __name__ == "__main__":
    sys.exit(main())
