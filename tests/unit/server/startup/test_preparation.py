"""What a service gives its launcher, how it gives up root's rights, and what it refuses before."""

import json
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from attrs import evolve

from jobworker.config.settings import Settings
from jobworker.errors import ConfigError, JobworkerError
from jobworker.sandbox.protocol.policy import policy_message
from jobworker.sandbox.service.launch import OpenedLauncher
from jobworker.server.startup import preparation
from jobworker.server.startup.preparation import instance_name, policy_for, spool_directory

MIB = 1 << 20
STATE = Path("/var/lib/jobworker")


@pytest.fixture
def launcher() -> Iterator[OpenedLauncher]:
    """A launcher that runs by the usual settings of this state directory."""
    near, far = socket.socketpair()
    with near, far:
        yield OpenedLauncher(
            sock=near,
            cgroup_kind="v2",
            gaps=(),
            policy=policy_message(policy_for(Settings(), STATE)),
            bounds_disks=True,
        )


def test_instance_is_named_by_the_real_path_of_its_state(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    name = instance_name(tmp_path / "real")
    assert instance_name(tmp_path / "link") == name
    assert instance_name(tmp_path) != name
    assert instance_name(STATE) == "jobworker-becc48a7", (
        "groups of earlier versions are found by it"
    )


def test_policy_has_the_settings_in_bytes_and_the_places_in_the_state_directory() -> None:
    settings = Settings()
    settings = evolve(
        settings,
        sandbox=evolve(settings.sandbox, disk_limit=64, tmpfs_limit=8, overcommit_disk=False),
        worker=evolve(settings.worker, keep_free=100),
    )
    policy = policy_for(settings, STATE)
    assert (policy.disk_bytes, policy.tmpfs_bytes) == (64 * MIB, 8 * MIB)
    assert policy.keep_free_bytes == 100 * MIB
    assert not policy.overcommit
    assert {policy.stage, policy.scratch, policy.volumes} == {
        f"{STATE}/{name}" for name in ("stage", "scratch", "volumes")
    }
    assert policy.instance == instance_name(STATE)
    assert policy.max_jobs == settings.worker.max_concurrent_jobs


def test_there_are_no_more_spares_than_jobs() -> None:
    settings = Settings()
    few = evolve(settings.worker, max_concurrent_jobs=1)
    many = evolve(settings.sandbox, spares=4)
    assert policy_for(evolve(settings, worker=few, sandbox=many), STATE).spares == 1
    assert policy_for(evolve(settings, sandbox=many), STATE).spares == 4


def test_spool_stands_in_the_services_own_directory() -> None:
    settings = evolve(Settings(), worker=evolve(Settings().worker, state_dir="/state"))
    assert spool_directory(settings) == Path("/state/service/spool")


# --- a launcher that runs already ---------------------------------------------------------------


def test_launcher_of_another_state_directory_is_refused(launcher: OpenedLauncher) -> None:
    preparation._check_instance(launcher, STATE, "/run/launcher")
    with pytest.raises(ConfigError, match=r"it keeps the jobs of another worker\.state_dir"):
        preparation._check_instance(launcher, Path("/elsewhere"), "/run/launcher")


def test_launcher_that_works_by_older_settings_is_told_with_their_names(
    launcher: OpenedLauncher,
) -> None:
    policy = policy_for(Settings(), STATE)
    assert preparation._differences(launcher, policy) == []
    changed = policy._replace(max_jobs=policy.max_jobs + 1, spares=policy.spares + 1)
    (told,) = preparation._differences(launcher, changed)
    assert "older settings (max_jobs, spares)" in told


def test_setting_that_an_earlier_launcher_does_not_know_is_no_difference(
    launcher: OpenedLauncher,
) -> None:
    known = {name: value for name, value in launcher.policy.items() if name != "overcommit"}
    assert len(known) < len(launcher.policy)
    earlier = evolve(launcher, policy=known)
    assert preparation._differences(earlier, policy_for(Settings(), STATE)) == []


# --- what is refused ----------------------------------------------------------------------------


def test_jobs_cannot_be_left_to_a_launcher_that_ends_with_the_service() -> None:
    settings = evolve(Settings(), worker=evolve(Settings().worker, jobs_on_exit="leave"))
    with pytest.raises(ConfigError, match="cannot leave jobs behind") as caught:
        preparation.prepare(settings, None)
    assert "launcher.socket" in caught.value.remedy


def in_a_fork(work: Callable[[], object]) -> object:
    """The result of a function in a process of its own."""
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        outcome: object = "it failed"
        try:
            outcome = work()
        except JobworkerError as error:
            outcome = [error.message, error.remedy]
        finally:
            os.write(tell, json.dumps(outcome).encode())
            os._exit(0)
    os.close(tell)
    with open(told, "rb") as pipe:
        outcome = json.loads(pipe.read())
    os.waitpid(child, 0)
    return outcome


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")


@needs_root
def test_first_directory_that_the_user_may_not_pass_is_named() -> None:
    with tempfile.TemporaryDirectory() as own:  # pytest lets nobody else into its own
        state = Path(own, "closed/state")
        (state / "service").mkdir(parents=True)
        Path(own).chmod(0o755)
        state.chmod(0o755)
        state.parent.chmod(0o700)

        def look() -> list[str]:
            os.setresuid(54321, 54321, 54321)
            error = preparation._unreachable(state, 54321)
            return [error.message, error.remedy]

        told = in_a_fork(look)
    assert isinstance(told, list)
    reason = f"as user 54321, cannot reach it: it may not pass through {state.parent}"
    assert told[0].endswith(reason)
    assert told[1] == f"let others pass: chmod o+x {state.parent}"


@needs_root
def test_roots_rights_are_given_up_for_good() -> None:
    def look() -> list[object]:
        os.setgroups([54323])
        preparation._give_up_root(54321, 54322)
        status = Path("/proc/self/status").read_text().splitlines()
        fields = dict(line.split(":\t", 1) for line in status if ":\t" in line)
        try:
            os.setresuid(0, 0, 0)
        except PermissionError:
            back = "refused"
        else:
            back = "taken"
        return [
            os.getresuid(),
            os.getresgid(),
            os.getgroups(),
            fields["NoNewPrivs"],
            int(fields["CapEff"], 16),
            os.umask(0),
            back,
        ]

    assert in_a_fork(look) == [[54321] * 3, [54322] * 3, [], "1", 0, 0o77, "refused"]


@needs_root
@pytest.mark.parametrize("ids", [(0, 54322), (54321, 0)])
def test_service_that_would_stay_root_does_not_start(ids: tuple[int, int]) -> None:
    told = in_a_fork(lambda: preparation._give_up_root(*ids))
    assert told == ["cannot give up root", ""]
