"""The cgroup v1 backend, with or without a cgroup2 mount beside it (hybrid).

Each controller has a hierarchy of its own, or shares one ("cpu,cpuacct"). In each hierarchy our
directory is below this process's own group, so that the limits of the parent groups hold. On a
hybrid host the cgroup2 mount serves to track processes: cgroup.kill, CLONE_INTO_CGROUP, and the CPU
time, which every cgroup2 group counts without any controller.

What the limits mean (kernel documentation, Documentation/admin-guide/cgroup-v1):
- cpu: a quota for each period of 100 ms (Documentation/scheduler/sched-bwc.rst).
- memory: limit_in_bytes, then memsw.limit_in_bytes, which must never be lower. A kernel that does
  not count swap has no memsw files. The host is refused then if it has swap.
- sockets: memory.kmem.tcp counts the buffers of TCP and UDP apart. Its limit is as large as the
  memory limit, so a job may have twice the memory. Each TCP socket can exceed it by a piece or two,
  which the kernel charges and does not refuse (net/ipv4/tcp_input.c, sk_forced_mem_schedule).
- io: blkio.throttle counts and delays bios in the context that submits them. Kernel threads submit
  buffered writes, so these are neither delayed nor counted (`missing_features`).
- OOM: the kernel kills one process and not the group, so the launcher ends the others. The kernel
  signals `oom_fd` when it begins to look for a victim, in this group or in one above it. The count
  in memory.oom_control follows a moment later, or never if the victim is in another group.
  Which limit it was: for an OOM of a group above, the kernel also signals our directory, which has
  no limit of its own; for an OOM of the host it signals no group. (memory.failcnt is of no use: it
  also counts each time that the kernel then found memory, as for a job that reads files.)
"""

import contextlib
import os
from collections.abc import Sequence
from functools import partial

from jobworker.sandbox.cgroup import block_devices, files, mounts
from jobworker.sandbox.cgroup import cpuset as cgroup_cpuset
from jobworker.sandbox.cgroup.accounting import ScopeLimits, ScopeUsage
from jobworker.sandbox.cgroup.directories import Kind
from jobworker.sandbox.cgroup.scope import JobScope
from jobworker.sandbox.cgroup.tree import Tree

PERIOD_US = 100_000  # the kernel's default, and what cgroup v2 uses
_NEEDED = {
    "cpu": ("cpu.cfs_quota_us", "CONFIG_CFS_BANDWIDTH"),
    "memory": ("memory.limit_in_bytes", "CONFIG_MEMCG_V1"),
    "io": ("blkio.throttle.read_bps_device", "CONFIG_BLK_DEV_THROTTLING"),
    "pids": ("pids.max", "CONFIG_CGROUP_PIDS"),
}
_UNLIMITED = 2**62  # bytes; the kernel shows its largest number of pages
_THROTTLES = ("blkio.throttle.read_bps_device", "blkio.throttle.write_bps_device")
_SOCKETS = "memory.kmem.tcp"
_IO_COUNTERS = "blkio.throttle.io_service_bytes_recursive"


class ScopeV1(JobScope):
    """A scope in v1 hierarchies."""

    def __init__(self, tree: "TreeV1", name: str, directories: Sequence[int] = ()) -> None:
        self._v1 = tree
        super().__init__(tree, name, directories)

    def open(self) -> None:
        super().open()
        if "memory" in self._tops:
            self.oom_fd = _watch_oom(self._tops["memory"], self._path)

    def _write_limits(self, limits: ScopeLimits) -> None:
        if "cpu" in self._tops:
            _limit_cpu(self._tops["cpu"], self._path, limits.cpu_percent)
        if "memory" in self._tops:
            _limit_memory(self._tops["memory"], self._path, limits.memory_bytes)
        if "io" in self._tops:
            devices = self._v1.devices()
            _limit_io(self._tops["io"], self._path, limits.io_bps, devices)
        if "pids" in self._tops:
            value = str(limits.pids or "max")
            files.set_limit(self._tops["pids"], f"{self._path}/pids.max", value, value.__eq__)

    def _lift_io_limit(self) -> None:
        _limit_io(self._tops["io"], self._path, 0, ())

    def _counters(self) -> ScopeUsage:
        usage = ScopeUsage(cpu_ns=self._cpu_ns())
        if "cpu" in self._tops:
            stat = files.table(files.read(self._tops["cpu"], f"{self._path}/cpu.stat"))
            usage = usage._replace(throttled_ns=stat.get("throttled_time", 0))
        if "memory" in self._tops:
            usage = usage._replace(
                memory_bytes=self._number("memory", "memory.usage_in_bytes"),
                memory_peak_bytes=self._number("memory", "memory.max_usage_in_bytes"),
                oom_kills=self._oom_count(),
            )
        if "io" in self._tops:
            text = files.read(self._tops["io"], f"{self._path}/{_IO_COUNTERS}")
            read, written = sum_io(text, self._v1.stacked)
            usage = usage._replace(read_bytes=read, write_bytes=written)
        if "pids" in self._tops:
            usage = usage._replace(pids=self._number("pids", "pids.current"))
        return usage

    def _cpu_ns(self) -> int:
        if "cpuacct" in self._tops:
            return self._number("cpuacct", "cpuacct.usage")
        if self._unified is not None:
            stat = files.table(files.read(self._unified, f"{self._path}/cpu.stat"))
            return stat.get("usage_usec", 0) * 1000
        return 0

    def _oom_count(self) -> int:
        if "memory" not in self._tops:
            return 0
        text = files.read(self._tops["memory"], f"{self._path}/memory.oom_control")
        return files.table(text).get("oom_kill", 0)

    def _own_oom_count(self) -> int:
        self.clear_oom()  # read before the groups above, because the kernel signals those first
        return self._oom_events - self._v1.ooms_above()

    def sockets_beyond_limit(self) -> int:
        if not self._memory_limit_bytes:
            return 0
        try:
            held = self._number("memory", f"{_SOCKETS}.usage_in_bytes")
            return max(0, held - self._number("memory", f"{_SOCKETS}.limit_in_bytes"))
        except OSError:  # the job has just ended, or this kernel does not count them
            return 0

    def sockets_counted(self) -> tuple[int, int]:
        if not self._memory_limit_bytes:
            return super().sockets_counted()
        try:
            most = self._number("memory", f"{_SOCKETS}.max_usage_in_bytes")
            now = self._number("memory", f"{_SOCKETS}.usage_in_bytes")
            files.write(self._tops["memory"], f"{self._path}/{_SOCKETS}.max_usage_in_bytes", "0")
        except OSError:
            return super().sockets_counted()
        return most, now

    def _restart_peak(self) -> None:
        if "memory" in self._tops:
            files.write(self._tops["memory"], f"{self._path}/memory.max_usage_in_bytes", "0")

    def _number(self, controller: str, file: str) -> int:
        return int(files.read(self._tops[controller], f"{self._path}/{file}"))


class TreeV1(Tree):
    """Our directories in the v1 hierarchies, and in the cgroup2 mount of a hybrid host."""

    def __init__(self, name: str, by_controller: dict[str, int], unified: int | None) -> None:
        super().__init__(name, by_controller, unified)
        self.kind: Kind = "v1" if unified is None else "hybrid"
        self.stacked: frozenset[str] = frozenset()
        self._blocks = block_devices.open_directory() if "io" in by_controller else None
        self._oom_fd = -1
        self._ooms_above = 0

    def devices(self) -> tuple[block_devices.Device, ...]:
        """The block devices that exist now. Updates `stacked` too."""
        found = () if self._blocks is None else block_devices.scan(self._blocks)
        self.stacked = frozenset(device.number for device in found if device.stacked)
        return found

    def watch_memory(self) -> None:
        """Have the kernel signal OOMs of the groups above. Raises OSError."""
        if "memory" in self.by_controller:
            self._oom_fd = _watch_oom(self.by_controller["memory"], ".")

    def ooms_above(self) -> int:
        """How many OOMs of groups above the scopes the kernel has signalled."""
        if self._oom_fd >= 0:
            with contextlib.suppress(BlockingIOError):
                self._ooms_above += os.eventfd_read(self._oom_fd)
        return self._ooms_above

    def missing_features(self) -> tuple[str, ...]:
        notes = []
        if "io" in self.by_controller:
            notes.append("buffered writes are neither throttled nor counted on cgroup v1")
        if "memory" in self.by_controller and not self._counts_sockets():
            notes.append("TCP and UDP buffers are not charged to the job on this kernel")
        if not self.kills_groups:
            notes.append(
                "without cgroup.kill (Linux 5.14, cgroup2 mounted) processes are killed one by one"
            )
        if "cpu" in self.by_controller and "cpuacct" not in self.by_controller and not self.unified:
            notes.append("CPU time is not measured: neither cpuacct nor cgroup2 is mounted")
        return tuple(notes)

    def _counts_sockets(self) -> bool:
        top = self.by_controller["memory"]
        return files.exists(top, f"{_SOCKETS}.limit_in_bytes")

    def close(self) -> None:
        super().close()
        if self._blocks is not None:
            os.close(self._blocks)
            self._blocks = None
        if self._oom_fd >= 0:
            os.close(self._oom_fd)
            self._oom_fd = -1

    def _new_scope(self, name: str, directories: Sequence[int] = ()) -> ScopeV1:
        return ScopeV1(self, name, directories)


def open_v1(
    found: mounts.Hierarchies, controllers: Sequence[str], name: str, parent: str, has_swap: bool
) -> TreeV1:
    """Make our directories in each hierarchy, below our own group or below `parent`.

    Raises `HostUnsupported` with the controller, the reason and the remedy.
    """
    tops: dict[str, int] = {}  # path of a directory to its descriptor
    by_controller: dict[str, int] = {}
    try:
        for controller in controllers:
            v1_name = mounts.V1_NAMES[controller]
            mount = found.legacy(v1_name)
            if mount is None:
                raise mounts.missing(controller, found, ())
            base = mounts.base_path(found, mount, v1_name, parent)
            by_controller[controller] = _own_directory(tops, base, name, controller)
            _check(by_controller[controller], controller, has_swap)
        unified = _open_unified(found, tops, name, parent)
        accounting = found.legacy("cpuacct")
        # cpuacct costs nothing in cpu's mount. In another mount it is used only without cgroup2.
        shared = accounting is not None and "cpu" in accounting.controllers
        if "cpu" in controllers and accounting is not None and (shared or unified is None):
            base = mounts.base_path(found, accounting, "cpuacct", parent)
            by_controller["cpuacct"] = _own_directory(tops, base, name, "cpu")
        if (cpuset := cgroup_cpuset.open_v1(found, name, parent)) is not None:
            path, by_controller[cgroup_cpuset.CONTROLLER] = cpuset
            tops[path] = cpuset[1]
        return _tree(name, by_controller, unified)
    except BaseException:
        for path, top in tops.items():
            mounts.discard(path, top)
        raise


def _tree(name: str, by_controller: dict[str, int], unified: int | None) -> TreeV1:
    try:
        tree = TreeV1(name, by_controller, unified)
    except OSError as error:
        reason = f"cannot list the block devices: {error}"
        raise mounts.unsupported("io", reason, "mount sysfs on /sys") from error
    tree.devices()
    try:
        tree.watch_memory()
    except OSError as error:
        reason = f"cannot have the kernel report OOM events: {error}"
        raise mounts.unsupported("memory", reason, "use a kernel with CONFIG_MEMCG_V1") from error
    return tree


def _open_unified(
    found: mounts.Hierarchies, tops: dict[str, int], name: str, parent: str
) -> int | None:
    mount = found.unified()
    if mount is None:
        return None
    return _own_directory(tops, mounts.base_path(found, mount, "", parent), name, "")


def _own_directory(tops: dict[str, int], base: str, name: str, controller: str) -> int:
    """A descriptor of our directory below `base`, which is made if it does not exist.

    `tops` keeps the descriptors, so that each path is opened once.
    """
    path = f"{base}/{name}"
    if path not in tops:
        tops[path] = mounts.make_directory(path, controller)
    return tops[path]


def _check(top: int, controller: str, has_swap: bool) -> None:
    file, option = _NEEDED[controller]
    if not files.exists(top, file):
        reason = f"the kernel does not offer {file}"
        raise mounts.unsupported(controller, reason, f"use a kernel with {option}")
    if controller == "memory" and has_swap and not files.exists(top, "memory.memsw.limit_in_bytes"):
        reason = "the host has swap, which this kernel does not count"
        remedy = "add swapaccount=1 to the kernel command line or switch swap off"
        raise mounts.unsupported(controller, reason, remedy)


def _watch_oom(top: int, name: str) -> int:
    """An eventfd that the kernel signals at an OOM (cgroup-v1/memory.rst, sections 9 and 10)."""
    event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        control = os.open(f"{name}/memory.oom_control", os.O_RDONLY | os.O_CLOEXEC, dir_fd=top)
        try:
            files.write(top, f"{name}/cgroup.event_control", f"{event} {control}")
        finally:
            os.close(control)
    except OSError:
        os.close(event)
        raise
    return event


def _limit_cpu(top: int, name: str, cpu_percent: int) -> None:
    quota = str(cpu_percent * PERIOD_US // 100) if cpu_percent else "-1"
    period = str(PERIOD_US)
    files.set_limit(top, f"{name}/cpu.cfs_period_us", period, period.__eq__)
    files.set_limit(top, f"{name}/cpu.cfs_quota_us", quota, quota.__eq__)


def _limit_memory(top: int, name: str, memory_bytes: int) -> None:
    page = os.sysconf("SC_PAGESIZE")
    value = str(memory_bytes or -1)
    plain, swap = f"{name}/memory.limit_in_bytes", f"{name}/memory.memsw.limit_in_bytes"

    def kept_in_pages(text: str) -> bool:
        return int(text) == memory_bytes // page * page if memory_bytes else int(text) >= _UNLIMITED

    counts_swap = files.exists(top, swap)
    if counts_swap:
        # Lifted first, since it must never be below the plain limit.
        files.set_limit(top, swap, "-1", lambda kept: int(kept) >= _UNLIMITED)
    try:
        files.write(top, plain, value)
    except OSError as error:
        charged = files.read(top, f"{name}/memory.usage_in_bytes").strip()
        reason = f"{error.strerror}, {charged} bytes are charged to the scope already"
        raise files.refused(plain, value, reason, "raise the job's memory limit") from error
    if not kept_in_pages(kept := files.read(top, plain)):
        raise files.refused(plain, value, f"the kernel kept {kept.strip()!r}")
    if counts_swap:
        files.set_limit(top, swap, value, kept_in_pages)
    sockets = f"{name}/{_SOCKETS}.limit_in_bytes"
    if files.exists(top, sockets):
        files.set_limit(top, sockets, value, kept_in_pages)


def _limit_io(top: int, name: str, io_bps: int, devices: Sequence[block_devices.Device]) -> None:
    for throttle in _THROTTLES:
        path = f"{name}/{throttle}"
        if io_bps and not devices:
            raise files.refused(path, str(io_bps), "the host has no block device", "lift io_bps")
        for number in files.table(files.read(top, path)):
            files.set_limit(top, path, f"{number} 0", partial(_has_line, number, ""))
        for device in devices if io_bps else ():
            value = f"{device.number} {io_bps}"
            files.set_limit(top, path, value, partial(_has_line, device.number, str(io_bps)))


def _has_line(number: str, bps: str, text: str) -> bool:
    """Whether a throttle file has this limit for a device; `bps` "" is no limit."""
    lines = dict(line.split() for line in text.splitlines())
    return lines.get(number, "") == bps


def sum_io(text: str, stacked: frozenset[str]) -> tuple[int, int]:
    """The bytes read and written, from lines "MAJOR:MINOR Read|Write|… BYTES".

    Devices whose bytes are also counted on a device below them are left out.
    """
    sums = {"Read": 0, "Write": 0}
    for line in text.splitlines():
        row = line.split()
        if len(row) == 3 and row[1] in sums and not block_devices.is_counted_below(row[0], stacked):
            sums[row[1]] += int(row[2])
    return sums["Read"], sums["Write"]
