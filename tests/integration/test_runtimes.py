"""Runtimes: jobs in a root tree of the configuration instead of the host's programs."""

import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from jobworker.errors import HostUnsupported

from ..services import open_embedded
from .conftest import left_behind
from .wire import Refused, Wire, open_wire


def small_tree(path: Path) -> Path:
    """A root tree of one static program."""
    busybox = shutil.which("busybox", path="/usr/bin:/bin")
    if busybox is None:
        pytest.skip("needs a static busybox (Debian: busybox-static)")
    for name in ("bin", "etc", "root", "tmp", "var"):
        (path / name).mkdir(parents=True, mode=0o755)
    shutil.copy(busybox, path / "bin" / "busybox")
    for name in ("sh", "ls", "cat", "id", "stat", "touch", "env", "echo", "head", "true"):
        (path / "bin" / name).symlink_to("busybox")
    (path / "etc" / "os-release").write_text('NAME="Small"\n')
    (path / "etc" / "secret").write_text("of the tree's own root\n")
    (path / "etc" / "secret").chmod(0o600)
    (path / "etc" / "resolv.conf").symlink_to("../run/systemd/resolve/stub-resolv.conf")
    os.chown(path / "tmp", 7, 8)
    return path


@pytest.fixture
def directory(open_directory: Callable[[], Path]) -> Path:
    return open_directory()


@pytest.fixture
async def small(directory: Path) -> AsyncIterator[Wire]:
    tree = small_tree(directory / "small")
    changes = {"runtimes.small": {"path": str(tree)}}
    async with open_embedded(directory, changes) as service, open_wire(service) as wire:
        yield wire
    assert left_behind(directory) == []


async def test_job_runs_in_the_tree_with_a_root_of_its_own(small: Wire, directory: Path) -> None:
    tree = directory / "small"
    before = sorted(str(path) for path in tree.rglob("*"))
    script = (
        "cat /etc/os-release; cat /etc/secret; id -u; stat -c '%u %a %n' /bin/busybox /root /tmp; "
        "ls /usr /lib 2>&1; echo x > /bin/made; touch /dev/shm/x /run/x; ls -A /workspace; "
        "echo y > f && cat f; ls /dev"
    )
    out, err, job = await small.run("sh", "-c", script, runtime="small")
    assert out.splitlines()[:6] == [
        *('NAME="Small"', "of the tree's own root", "0"),
        *("0 755 /bin/busybox", "0 700 /root", "0 1777 /tmp"),
    ], err
    assert "ls: /usr: No such file or directory" in out
    assert "y\nfd\nfull\nnull\n" in out
    assert (err, job["exit_code"]) == ("", 0)
    assert sorted(str(path) for path in tree.rglob("*")) == before
    out, _, _ = await small.run("ls", "/bin/made", runtime="small")
    assert out == ""


async def test_names_and_resolver_are_the_hosts(small: Wire) -> None:
    out, err, _ = await small.run("cat", "/etc/hosts", "/etc/resolv.conf", runtime="small")
    assert out == Path("/etc/hosts").read_text() + Path("/etc/resolv.conf").read_text(), err


async def test_other_jobs_run_in_the_hosts_programs_still(small: Wire) -> None:
    out, _, _ = await small.run("ls", "/usr/bin/env")
    assert out == "/usr/bin/env\n"


async def test_program_of_the_host_is_not_in_the_tree(small: Wire) -> None:
    with pytest.raises(Refused) as refused:
        await small.start("/usr/bin/env", runtime="small")
    assert refused.value.code == 1012 or "no such program" in refused.value.message


@pytest.mark.parametrize("name", ["nosuch", "../small", "", "small\n"])
async def test_unknown_runtime_is_refused_by_name(small: Wire, name: str) -> None:
    if not name:
        assert (await small.run("true", runtime=name))[2]["exit_code"] == 0
        return
    with pytest.raises(Refused, match="runtime") as refused:
        await small.start("true", runtime=name)
    assert refused.value.code == -32602


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "there is no such directory"),
        ("file", "there is no such directory"),
        ("empty", "holds neither bin/sh nor usr/bin/sh"),
        ("root", "the host's own root"),
    ],
)
async def test_tree_that_is_none_is_refused_at_the_start(
    directory: Path, kind: str, words: str
) -> None:
    tree = directory / "tree"
    if kind == "file":
        tree.write_text("x")
    elif kind == "empty":
        tree.mkdir()
    elif kind == "root":
        tree.symlink_to("/")
    with pytest.raises(HostUnsupported, match=words) as refused:
        async with open_embedded(directory, {"runtimes.broken": {"path": str(tree)}}):
            pass
    assert "broken" in str(refused.value)
    assert left_behind(directory) == []


@pytest.fixture(scope="session")
def debian(open_directory: Callable[[], Path]) -> Path:
    """A minimal Debian, made once."""
    if shutil.which("mmdebstrap") is None:
        pytest.skip("needs mmdebstrap")
    tree = open_directory() / "debian"
    sources = "/etc/apt/sources.list.d/debian.sources"
    source = sources if os.path.exists(sources) else "/etc/apt/sources.list"
    command = ["mmdebstrap", "--quiet", "--variant=extract", "--include=dash,coreutils,libc-bin"]
    made = subprocess.run(
        [*command, "stable", str(tree), source], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"needs a Debian mirror that answers: {made.stderr.strip()[-200:]}")
    return tree


@pytest.mark.timeout(300)
async def test_job_runs_in_a_debian_of_mmdebstrap(debian: Path, directory: Path) -> None:
    changes = {"runtimes.debian": {"path": str(debian)}}
    async with open_embedded(directory, changes) as service, open_wire(service) as wire:
        script = "ls -d /var/lib/dpkg; ls /usr/bin/python3; touch /x"
        out, err, job = await wire.run("/bin/dash", "-c", script, runtime="debian")
    assert out == "/var/lib/dpkg\n"
    assert "python3" in err
    assert job["exit_code"] == 0
    assert not (debian / "x").exists()
