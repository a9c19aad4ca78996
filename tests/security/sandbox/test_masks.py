"""Masks over /proc: there, whatever a job does to what they are made of."""

import json

from ...integration.wire import Wire

# CVE-2025-31133: what masks are made of, /dev/null, exchanged for a link while a container is made.
EXCHANGE = """
import os
for path, target in (("/dev/null", "/proc/sys/kernel/core_pattern"), ("/proc/kcore", "/dev/null"),
                     ("/proc/sys", "/tmp"), ("/dev/shm", "/proc/sys")):
    try:
        os.rename(path, path + ".old")
    except OSError:
        pass
    try:
        os.symlink(target, path)
    except OSError:
        pass
"""
LOOK = """
import json, os, stat
def kind(path):
    try: status = os.lstat(path)
    except OSError: return "missing"
    if stat.S_ISCHR(status.st_mode) and status.st_rdev == os.makedev(1, 3): return "null"
    if stat.S_ISDIR(status.st_mode) and not os.listdir(path): return "empty"
    return "open"
masked = {path: kind(path) for path in json.loads(os.environ["MASKED"])}
def read_only(path):
    try: return bool(os.statvfs(path).f_flag & os.ST_RDONLY)
    except OSError: return "missing"
only = {path: read_only(path) for path in json.loads(os.environ["READ_ONLY"])}
oom = open("/proc/self/oom_score_adj").read().strip()
print(json.dumps([masked, only, oom, os.path.islink("/dev/null")]))
"""

# The lists stand here again, on purpose: one that is taken out of the plan has to be missed.
MASKED = [
    f"/proc/{name}"
    for name in (
        "acpi asound buddyinfo bus cmdline config.gz consoles diskstats dma fs interrupts iomem "
        "ioports kallsyms kcore keys key-users kmsg kpagecgroup kpagecount kpageflags "
        "latency_stats locks mdstat mtrr pagetypeinfo partitions sched_debug scsi swaps "
        "sysrq-trigger timer_list timer_stats vmallocinfo"
    ).split()
]
READ_ONLY = [f"/proc/{name}" for name in "irq pressure sys".split()]


async def test_masks_hold_in_jobs_beside_one_that_exchanges_what_they_are_made_of(
    admin: Wire,
) -> None:
    environment = {"MASKED": json.dumps(MASKED), "READ_ONLY": json.dumps(READ_ONLY)}
    loop = f"exec({EXCHANGE!r})\nprint('going', flush=True)\nwhile True: exec({EXCHANGE!r})"
    attacker = await admin.start("python3", "-c", loop, limits={"cpu_percent": 30})
    try:
        for _ in range(6):
            out, err, _ = await admin.run("python3", "-c", LOOK, environment=environment)
            masked, read_only, oom, is_link = json.loads(out)
            there = {path: kind for path, kind in masked.items() if kind != "missing"}
            assert "open" not in there.values(), (there, err)
            assert len(there) > 3, there
            assert all(value in (True, "missing") for value in read_only.values()), read_only
            assert not is_link
            # CVE-2025-52881: what the launch writes to /proc has arrived there.
            assert oom == "0"
    finally:
        await admin.call("job.stop", id=attacker)
