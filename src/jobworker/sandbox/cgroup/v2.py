"""The cgroup v2 backend: one directory for each job, with all controllers in it.

What the limits mean (kernel documentation, Documentation/admin-guide/cgroup-v2.rst):

- cpu: cpu.max, with periods of 100 ms.
- memory: memory.max, with memory.swap.max 0 and memory.oom.group 1. So the kernel itself ends the
  whole job, and no event is needed.
- io: io.max for each device. It also delays buffered writes if the file system supports writeback
  by group (ext4, btrfs, xfs).
- pids: pids.max.

If memory.max is set below the memory that is charged already, the write succeeds and the kernel
kills the group. So arm() reads the charge first. From Linux 6.12 on, memory.peak can be reset for
one open descriptor; before, it counts from the creation of the scope.
"""

import contextlib
import errno
import os
from collections.abc import Sequence
from functools import partial

from jobworker.errors import HostUnsupported
from jobworker.sandbox.cgroup import block_devices, files, mounts
from jobworker.sandbox.cgroup import cpuset as cgroup_cpuset
from jobworker.sandbox.cgroup.accounting import ScopeLimits, ScopeUsage
from jobworker.sandbox.cgroup.delegation import Base, enable
from jobworker.sandbox.cgroup.directories import Kind
from jobworker.sandbox.cgroup.scope import JobScope
from jobworker.sandbox.cgroup.tree import Tree

PERIOD_US = 100_000
_NEEDED = {
    "cpu": ("cpu.max", "CONFIG_CFS_BANDWIDTH"),
    "memory": ("memory.max", "CONFIG_MEMCG"),
    "io": ("io.max", "CONFIG_BLK_DEV_THROTTLING"),
    "pids": ("pids.max", "CONFIG_CGROUP_PIDS"),
}


class ScopeV2(JobScope):
    """A scope in the hierarchy of v2."""

    def __init__(self, tree: "TreeV2", name: str, directories: Sequence[int] = ()) -> None:
        self._v2 = tree
        self._top = directories[0] if directories else tree.top
        self._peak_fd: int | None = None
        self._peak_seen = 0
        super().__init__(tree, name, directories)

    def _write_limits(self, limits: ScopeLimits) -> None:
        if "cpu" in self._tree.by_controller:
            quota = str(limits.cpu_percent * PERIOD_US // 100) if limits.cpu_percent else "max"
            self._set("cpu.max", f"{quota} {PERIOD_US}")
        if "memory" in self._tree.by_controller:
            self._limit_memory(limits.memory_bytes)
        if "io" in self._tree.by_controller:
            self._limit_io(limits.io_bps, self._v2.devices())
        if "pids" in self._tree.by_controller:
            self._set("pids.max", str(limits.pids or "max"))

    def _limit_memory(self, memory_bytes: int) -> None:
        page = os.sysconf("SC_PAGESIZE")
        path, value = f"{self._path}/memory.max", str(memory_bytes or "max")
        charged = self._number("memory.current")
        if memory_bytes and charged > memory_bytes:
            reason = f"{charged} bytes are charged to the scope already"
            raise files.refused(path, value, reason, "raise the job's memory limit")
        in_pages = str(memory_bytes // page * page) if memory_bytes else "max"
        if self._v2.groups_oom:
            self._set("memory.oom.group", "1")
        if self._v2.counts_swap:
            self._set("memory.swap.max", "0" if memory_bytes else "max")
        files.set_limit(self._top, path, value, in_pages.__eq__)

    def _limit_io(self, io_bps: int, devices: Sequence[block_devices.Device]) -> None:
        path = f"{self._path}/io.max"
        if io_bps and not devices:
            raise files.refused(path, str(io_bps), "the host has no block device", "lift io_bps")
        for number in keyed(self._read("io.max")):
            value = f"{number} rbps=max wbps=max"
            files.set_limit(self._top, path, value, partial(_has_device, number, "max"))
        for device in devices if io_bps else ():
            value = f"{device.number} rbps={io_bps} wbps={io_bps}"
            files.set_limit(
                self._top, path, value, partial(_has_device, device.number, str(io_bps))
            )

    def _lift_io_limit(self) -> None:
        self._limit_io(0, ())

    def _counters(self) -> ScopeUsage:
        stat = files.table(self._read("cpu.stat"))
        usage = ScopeUsage(
            cpu_ns=stat.get("usage_usec", 0) * 1000,
            throttled_ns=stat.get("throttled_usec", 0) * 1000,
        )
        if "memory" in self._tree.by_controller:
            now = self._number("memory.current")
            usage = usage._replace(
                memory_bytes=now, memory_peak_bytes=self._peak(now), oom_kills=self._oom_count()
            )
        if "io" in self._tree.by_controller:
            read, written = sum_io(self._read("io.stat"), self._v2.stacked)
            usage = usage._replace(read_bytes=read, write_bytes=written)
        if "pids" in self._tree.by_controller:
            usage = usage._replace(pids=self._number("pids.current"))
        return usage

    def _peak(self, now_bytes: int) -> int:
        if self._peak_fd is not None:
            return int(os.pread(self._peak_fd, 64, 0))
        if self._v2.keeps_peak:
            return self._number("memory.peak")
        self._peak_seen = max(self._peak_seen, now_bytes)  # Linux before 5.19 has no peak
        return self._peak_seen

    def _restart_peak(self) -> None:
        self._peak_seen = 0
        if "memory" not in self._tree.by_controller or not self._v2.keeps_peak:
            return
        descriptor, self._peak_fd = self._peak_fd, None
        try:
            if descriptor is None:
                flags = os.O_RDWR | os.O_CLOEXEC
                descriptor = os.open(f"{self._path}/memory.peak", flags, dir_fd=self._top)
            os.write(descriptor, b"0")
            self._peak_fd = descriptor
        except OSError as error:
            if descriptor is not None:
                os.close(descriptor)
            # Before Linux 6.12 the file can only be read: the peak counts from the creation.
            if error.errno not in {errno.EACCES, errno.EINVAL}:
                raise

    def _oom_count(self) -> int:
        if "memory" not in self._tree.by_controller:
            return 0
        events = files.table(self._read("memory.events"))
        # A kill of the group counts its victim twice in oom_kill; oom_group_kill: Linux 5.17.
        return events.get("oom_group_kill", 0) or events.get("oom_kill", 0)

    def _own_oom_count(self) -> int:
        if "memory" not in self._tree.by_controller:
            return 0
        return files.table(self._read("memory.events")).get("oom", 0)

    def _descriptors(self) -> list[int]:
        own = super()._descriptors()
        return own if self._peak_fd is None else [*own, self._peak_fd]

    def _set(self, file: str, value: str) -> None:
        files.set_limit(self._top, f"{self._path}/{file}", value, value.__eq__)

    def _read(self, file: str) -> str:
        return files.read(self._top, f"{self._path}/{file}")

    def _number(self, file: str) -> int:
        return int(self._read(file))


class TreeV2(Tree):
    """Our directory on cgroup2, below `base`."""

    kind: Kind = "v2"

    def __init__(self, name: str, controllers: Sequence[str], top: int, base: Base) -> None:
        super().__init__(name, dict.fromkeys(controllers, top), top)
        self.top = top
        self.stacked: frozenset[str] = frozenset()
        self.keeps_peak = files.exists(top, "memory.peak")
        self.groups_oom = files.exists(top, "memory.oom.group")
        self.counts_swap = files.exists(top, "memory.swap.max")
        self._base = base
        self._blocks = block_devices.open_directory() if "io" in controllers else None
        self.devices()

    def devices(self) -> tuple[block_devices.Device, ...]:
        """The block devices that exist now. Updates `stacked` too."""
        found = () if self._blocks is None else block_devices.scan(self._blocks)
        self.stacked = frozenset(device.number for device in found if device.stacked)
        return found

    def missing_features(self) -> tuple[str, ...]:
        notes = []
        if "memory" in self.by_controller and not self.keeps_peak:
            notes.append("peak memory is the largest sample (memory.peak needs Linux 5.19)")
        if "memory" in self.by_controller and not self.groups_oom:
            notes.append(
                "an OOM kill ends one process of a job (memory.oom.group needs Linux 4.19)"
            )
        if not self.kills_groups:
            notes.append("processes are killed one by one (cgroup.kill needs Linux 5.14)")
        return tuple(notes)

    def close(self) -> None:
        super().close()
        if self._blocks is not None:
            os.close(self._blocks)
            self._blocks = None
        self._base.restore()

    def _new_scope(self, name: str, directories: Sequence[int] = ()) -> ScopeV2:
        return ScopeV2(self, name, directories)


def open_v2(
    found: mounts.Hierarchies, controllers: Sequence[str], name: str, parent: str, has_swap: bool
) -> TreeV2:
    """Make our directory on cgroup2, with all controllers enabled for the scopes in it.

    Raises `HostUnsupported` with the controller, the reason and the remedy.
    """
    base = Base.choose(found, parent)
    top: int | None = None
    path = f"{base.path}/{name}"
    try:
        base.enable(controllers)
        top = mounts.make_directory(path)
        _check(top, controllers, has_swap)
        enable(path, controllers)
        with contextlib.suppress(HostUnsupported):  # see `cgroup.cpuset`
            base.enable([cgroup_cpuset.CONTROLLER])
            enable(path, [cgroup_cpuset.CONTROLLER])
            controllers = [*controllers, cgroup_cpuset.CONTROLLER]
        return _tree(name, controllers, top, base)
    except BaseException:
        if top is not None:
            mounts.discard(path, top)
        base.restore()
        raise


def _tree(name: str, controllers: Sequence[str], top: int, base: Base) -> TreeV2:
    try:
        return TreeV2(name, controllers, top, base)
    except OSError as error:
        reason = f"cannot list the block devices: {error}"
        raise mounts.unsupported("io", reason, "mount sysfs on /sys") from error


def _check(top: int, controllers: Sequence[str], has_swap: bool) -> None:
    for controller in controllers:
        file, option = _NEEDED[controller]
        if not files.exists(top, file):
            reason = f"the kernel does not offer {file}"
            raise mounts.unsupported(controller, reason, f"use a kernel with {option}")
    if "memory" in controllers and has_swap and not files.exists(top, "memory.swap.max"):
        reason = "the host has swap, which this kernel does not count"
        remedy = "remove swapaccount=0 from the kernel command line or switch swap off"
        raise mounts.unsupported("memory", reason, remedy)


def keyed(text: str) -> dict[str, dict[str, str]]:
    """The values in a nested keyed file such as io.max, by key and name.

    Each line is "KEY NAME=VALUE NAME=VALUE".
    """
    return {
        key: dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        for key, *pairs in (line.split() for line in text.splitlines() if line.strip())
    }


def _has_device(number: str, bps: str, text: str) -> bool:
    """Whether io.max has this limit for a device in both directions; without a line it is "max"."""
    row = keyed(text).get(number, {})
    return row.get("rbps", "max") == bps and row.get("wbps", "max") == bps


def sum_io(text: str, stacked: frozenset[str]) -> tuple[int, int]:
    """The bytes read and written, from io.stat.

    Devices whose bytes are also counted on a device below them are left out.
    """
    rows = [
        row
        for number, row in keyed(text).items()
        if not block_devices.is_counted_below(number, stacked)
    ]
    return sum(int(row.get("rbytes", 0)) for row in rows), sum(
        int(row.get("wbytes", 0)) for row in rows
    )
