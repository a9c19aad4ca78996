"""Any change of any setting between two starts works, or is refused by name; jobs go on either way.

One launcher with a live job and a waiting one stands through all of it. Each row changes settings
for one start of a service; after a row that is refused the old settings work again.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from jobworker.cli.worker.embedded_service import EmbeddedService
from jobworker.errors import HostUnsupported
from jobworker.server.host.id_ranges import own_id

from ..services import open_embedded
from .conftest import left_behind
from .outside import open_launcher, settings_with
from .wire import Wire, open_wire

pytestmark = pytest.mark.alone

Settings = Mapping[str, Mapping[str, object]]

LONG = f"100000.{os.getpid()}"
"""Seconds that no other job of this host sleeps."""

BASE: dict[str, dict[str, object]] = {
    "worker": {"max_concurrent_jobs": 1, "max_waiting_jobs": 5, "keep_output_jobs": 100},
    "sandbox": {"spares": 1},
}
WORKS: dict[str, dict[str, dict[str, object]]] = {
    "more jobs": {"worker": {"max_concurrent_jobs": 50}},
    "fewer waiting jobs than wait": {"worker": {"max_waiting_jobs": 0}},
    "no spares": {"sandbox": {"spares": 0}},
    "many spares": {"sandbox": {"spares": 9}},
    "user by number": {"worker": {"user": "65534"}},
    "user by name": {"worker": {"user": "daemon"}},
    "other ids": {"sandbox": {"first_uid": 3_200_000_000}},
    "defaults of limits": {
        "worker": {"default_cpu_limit": 50, "default_memory_limit": 4, "default_io_limit": 4096}
    },
    "no limits by default": {
        "worker": {
            "default_cpu_limit": 0,
            "default_memory_limit": 0,
            "default_process_limit": 0,
            "max_output": 0,
        }
    },
    "no controllers": {
        "cgroup": {"enable_controllers": []},
        "worker": {
            "default_cpu_limit": 0,
            "default_memory_limit": 0,
            "default_process_limit": 0,
        },
    },
    "another group": {"cgroup": {"parent": "nowhere/at/all"}},
    "output kept shortly": {
        "worker": {"keep_output_age": "1s", "keep_output_jobs": 1, "max_total_output": 1}
    },
    "small output": {"worker": {"max_output": 1, "at_max_output": "stop", "on_disk_full": "stop"}},
    "time-outs": {"worker": {"job_timeout": "1s", "stop_grace": "0"}},
    "jobs stay": {"worker": {"jobs_on_exit": "leave"}},
    "larger disks": {"sandbox": {"disk_limit": 2048, "tmpfs_limit": 1}},
    "other programs": {"sandbox": {"programs": ["/usr"], "etc": ["passwd"]}},
    "a runtime": {"runtimes.tree": {"path": "/srv"}},
    "a role": {"roles.tenant": {"operations": ["view"], "scope": "own"}},
    "limits of clients": {"limits": {"max_connections": 5, "max_follows": 1}},
    "logs": {"logging": {"level": "DEBUG", "format": "json"}},
    "no revocation list": {"security": {"crl": "", "min_tls_version": "1.2"}},
}
REFUSED: dict[str, tuple[dict[str, dict[str, object]], str]] = {
    "user among the jobs'": ({"worker": {"user": "AMONG"}}, "jobs have the ids"),
    "no such user": ({"worker": {"user": "nosuchuser"}}, "no such user"),
    "another directory": ({"worker": {"state_dir": "ELSEWHERE"}}, "another worker.state_dir"),
    "no launcher there": ({"launcher": {"socket": "/run/nosuch.sock"}}, "/run/nosuch.sock"),
    "a launcher of its own": ({"launcher": {"socket": ""}}, "another launcher is running"),
    "no room for ids": (
        {"sandbox": {"first_uid": 4_200_000_000}, "worker": {"max_concurrent_jobs": 4000}},
        "sandbox.first_uid",
    ),
    "a profile that is not there": ({"sandbox": {"seccomp_profile": "none.toml"}}, "none.toml"),
    "a certificate that is not there": ({"security": {"server_cert": "none.pem"}}, "none.pem"),
    "a default without its controller": (
        {"cgroup": {"enable_controllers": ["cpu"]}},
        "default_memory_limit",
    ),
}


def merged(changes: Settings, directory: Path) -> dict[str, dict[str, object]]:
    found = {section: dict(keys) for section, keys in settings_with(directory, BASE).items()}
    for section, keys in changes.items():
        found.setdefault(section, {}).update(keys)
    return found


def user_of(service: EmbeddedService) -> int:
    return os.stat(f"/proc/{service.process.pid}").st_uid


def user_of_process(*command: str) -> int:
    """Whose the one process with this command is, as the host sees it."""
    users = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (process / "cmdline").read_text().split("\0")[:-1] == [*command]:
                users.add(process.stat().st_uid)
    (user,) = users
    return user


async def states(wire: Wire, *jobs: int) -> list[object]:
    return [(await wire.call("job.status", id=job))["state"] for job in jobs]


@pytest.mark.timeout(400)
async def test_any_change_works_or_is_refused_by_name_and_jobs_go_on(
    open_directory: Callable[[], Path],
) -> None:
    directory = open_directory()
    with open_launcher(directory, BASE):
        async with open_embedded(directory, merged({}, directory)) as service:
            async with open_wire(service) as wire:
                running = await wire.start("sleep", LONG, timeout_seconds=0)
                waiting = await wire.start("echo", "at last")
            uid = user_of(service)
            assert uid == own_id(directory / "state")
        for name, changes in WORKS.items():
            async with open_embedded(directory, merged(changes, directory)) as service:
                async with open_wire(service) as wire:
                    assert await states(wire, running, waiting) == ["RUNNING", "PENDING"], name
                own = user_of(service)
                assert own == uid or "user" in name, (name, own)
            assert "Traceback" not in (directory / "log").read_text(), name
        user = user_of_process("sleep", LONG)
        special = {"AMONG": str(user), "ELSEWHERE": str(directory / "elsewhere")}
        for name, (changes, words) in REFUSED.items():
            named = {
                section: {key: special.get(str(value), value) for key, value in keys.items()}
                for section, keys in changes.items()
            }
            with pytest.raises(HostUnsupported, match=words) as refused:
                async with open_embedded(directory, merged(named, directory)):
                    pass
            assert "Traceback" not in refused.value.message, name
        again = open_embedded(directory, merged({}, directory))
        async with again as service, open_wire(service) as wire:
            assert await states(wire, running, waiting) == ["RUNNING", "PENDING"]
            await wire.call("job.stop", id=running)
            with trio.fail_after(20):
                assert (await wire.call("job.wait", id=waiting))["exit_code"] == 0
    assert left_behind(directory) == []


async def test_service_of_its_own_launcher_keeps_its_id_with_other_numbers(
    open_directory: Callable[[], Path],
) -> None:
    directory = open_directory()
    first = (59_000 + os.getpid() % 400 * 8) * 65_536
    for jobs, spares, ids in ((3, 1, first), (5, 1, first), (1, 0, first), (3, 1, first + 65_536)):
        changes: Settings = {
            "worker": {"max_concurrent_jobs": jobs},
            "sandbox": {"spares": spares, "first_uid": ids},
        }
        async with open_embedded(directory, changes) as service, open_wire(service) as wire:
            assert user_of(service) == own_id(directory / "state")
            text, _, job = await wire.run("echo", "here")
            assert (text, job["state"]) == ("here\n", "COMPLETED")
            result = await wire.call("job.log", id=1)
            assert (await wire.output(result["subscription"]))[0] == b"here\n"
    assert left_behind(directory) == []
