"""Volumes: what one job leaves in one, the next one finds; their sizes hold; none is half-made."""

import os
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio

from jobworker.cli.worker.embedded_service import EmbeddedService

from ..services import open_embedded
from .conftest import disks_in, until
from .wire import Refused, Wire, open_wire

MIB = 1 << 20


@pytest.fixture
async def cache(admin: Wire) -> AsyncIterator[str]:
    """A volume of 32 MiB."""
    await admin.call("volume.create", name="cache", size_bytes=32 * MIB)
    yield "cache"
    await admin.call("volume.remove", name="cache")


@pytest.fixture
async def thin(admin: Wire) -> AsyncIterator[str]:
    """A thin volume of 32 MiB."""
    await admin.call("volume.create", name="thin", size_bytes=32 * MIB, thin=True)
    yield "thin"
    await admin.call("volume.remove", name="thin")


def having(name: str, path: str = "") -> list[dict[str, str]]:
    """The volumes of a job that has one."""
    return [{"name": name, "path": path}]


async def listed(wire: Wire) -> dict[str, dict[str, int]]:
    found = (await wire.call("volume.list"))["volumes"]
    assert isinstance(found, list)
    return {volume.pop("name"): volume for volume in found}


async def test_next_job_finds_what_one_has_left(admin: Wire, cache: str) -> None:
    script = "cd /volumes/cache; ls -A; echo left > file; chown 1000:1000 file; id -u > owner"
    out, err, _ = await admin.run("sh", "-c", script, volumes=having(cache))
    assert (out, err) == ("", "")
    script = "cat file; stat -c '%u:%g %a' file owner . /srv; ls -A /volumes 2>&1"
    out, _, _ = await admin.run(
        "sh", "-c", f"cd /srv/here; {script}", volumes=having(cache, "/srv/here")
    )
    assert out.splitlines()[:5] == ["left", "1000:1000 644", "0:0 644", "0:0 755", "0:0 755"]
    assert "No such file" in out, "it is in no other place"
    out, _, _ = await admin.run("sh", "-c", "ls -d /volumes /srv/here", volumes=[])
    assert out == "", "a job that asks for none has none"


async def test_jobs_have_one_at_the_same_time(admin: Wire, cache: str) -> None:
    script = "cd /volumes/cache; echo one > one; until test -e two; do sleep 0.02; done; cat two"
    first = await admin.call(
        "job.run", job={"command": ["sh", "-c", script], "volumes": having(cache)}, follow={}
    )
    script = (
        "cd /volumes/cache; until test -e one; do sleep 0.02; done; stat -c %u one; echo 2 > two"
    )
    out, _, _ = await admin.run("sh", "-c", script, volumes=having(cache))
    assert out == "0\n", "root of one range is root of the other"
    assert (await admin.output(first["subscription"]))[0] == b"2\n"


async def test_full_volume_is_full_inside_alone(admin: Wire, cache: str) -> None:
    script = (
        "head -c 99000000 /dev/zero > /volumes/cache/x || echo full; stat -c %s /volumes/cache/x; "
        "head -c 99000000 /dev/zero > /workspace/x && echo wrote; rm /volumes/cache/x"
    )
    out, err, _ = await admin.run("sh", "-c", script, volumes=having(cache))
    assert "No space left on device" in err
    full, size, wrote = out.split()
    assert (full, wrote) == ("full", "wrote")
    assert 16 * MIB < int(size) < 32 * MIB


async def test_list_tells_sizes_and_who_has_it(admin: Wire, cache: str, thin: str) -> None:
    reserved = (await listed(admin))[cache]
    assert (reserved["thin"], reserved["used_bytes"] >= 32 * MIB) == (False, True)
    before = (await listed(admin))[thin]
    assert (before["size_bytes"], before["jobs"], before["thin"]) == (32 * MIB, 0, True)
    script = "head -c 9000000 /dev/urandom > /volumes/thin/x; sync; echo; sleep 60"
    result = await admin.call(
        "job.run", job={"command": ["sh", "-c", script], "volumes": having(thin)}, follow={}
    )
    await admin.notes(result["subscription"]).receive()
    during = (await listed(admin))[thin]
    assert during["jobs"] == 1
    assert during["used_bytes"] > before["used_bytes"] + 8 * MIB
    with pytest.raises(Refused, match="a live job has it"):
        await admin.call("volume.remove", name=thin)
    job = result["job"]
    assert isinstance(job, dict)
    await admin.call("job.stop", id=job["id"], grace_seconds=0)
    assert (await listed(admin))[thin]["jobs"] == 0


async def test_volumes_outlive_the_service(open_directory: Callable[[], Path]) -> None:
    directory = open_directory()
    async with open_embedded(directory) as service, open_wire(service) as wire:
        await wire.call("volume.create", name="kept", size_bytes=16 * MIB)
        await wire.run("sh", "-c", "echo kept > /volumes/kept/file", volumes=having("kept"))
    assert disks_in(directory) == []
    async with open_embedded(directory) as service, open_wire(service) as wire:
        out, _, _ = await wire.run("cat", "/volumes/kept/file", volumes=having("kept"))
        assert out == "kept\n"
        await wire.call("volume.remove", name="kept")
        assert await listed(wire) == {}
        with pytest.raises(Refused, match="there is no such volume"):
            await wire.start("true", volumes=having("kept"))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"name": "cache", "size_bytes": 16 * MIB}, "it exists"),
        *(
            ({"name": "huge", "size_bytes": 1 << 43, "thin": thin}, r"directory has \d+ MiB for it")
            for thin in (False, True)
        ),
        ({"name": "small", "size_bytes": 1000}, "size_bytes"),
        ({"name": "../x", "size_bytes": 16 * MIB}, "is no name"),
        ({"name": ".x", "size_bytes": 16 * MIB}, "is no name"),
        ({"name": "x" * 64, "size_bytes": 16 * MIB}, "is no name"),
    ],
)
async def test_volume_that_cannot_be_made_is_refused_by_name(
    admin: Wire, cache: str, service: EmbeddedService, call: dict[str, object], words: str
) -> None:
    with pytest.raises(Refused, match=words):
        await admin.call("volume.create", **call)
    assert list(await listed(admin)) == [cache]
    assert os.listdir(service.directory / "state" / "volumes") == ["cache.img"]


@pytest.mark.parametrize(
    ("volumes", "words"),
    [
        ([{"name": "nosuch"}], "there is no such volume"),
        ([{"name": "a/b"}], "is no name"),
        ([{"name": "cache", "path": "/"}], "whole root"),
        ([{"name": "cache", "path": "relative"}], "absolute"),
        ([{"name": "cache", "path": "/a/../etc"}], "without"),
        ([{"name": "cache", "path": "/proc/sys"}], "/proc"),
        ([{"name": "cache", "path": "/dev"}], "/dev"),
        ([{"name": "cache", "path": "/usr"}], "programs need"),
        ([{"name": "cache"}, {"name": "cache", "path": "/b"}], "twice"),
        ([{"name": "cache", "path": "/b"}, {"name": "other", "path": "/b"}], "two volumes"),
        ([{"name": "cache", "path": "/b"}, {"name": "other", "path": "/b/c"}], "inside"),
        ([{"name": "cache", "path": "/bin/x"}], "place-volume"),  # /bin is a link
        ([{"name": "cache", "path": "/etc/passwd"}], "place-volume"),
        ([{"name": "cache", "path": "/var/run/x"}], "place-volume"),
    ],
)
async def test_bad_mount_is_refused_by_name(
    admin: Wire, cache: str, volumes: list[dict[str, str]], words: str
) -> None:
    if words == "place-volume" and "/bin" in str(volumes) and not os.path.islink("/bin"):
        pytest.skip("needs a merged /usr")
    with pytest.raises(Refused, match=words):
        await admin.start("true", volumes=volumes)
    assert (await listed(admin))[cache]["jobs"] == 0


async def test_viewer_may_not_touch_volumes(viewer: Wire) -> None:
    calls: dict[str, dict[str, object]] = {
        "volume.list": {},
        "volume.create": {"name": "x", "size_bytes": 16 * MIB},
        "volume.remove": {"name": "x"},
    }
    for method, params in calls.items():
        with pytest.raises(Refused, match="may not use volumes"):
            await viewer.call(method, **params)


async def test_strange_files_among_the_images_hide_no_volume(
    open_directory: Callable[[], Path],
) -> None:
    async with open_embedded(open_directory()) as service, open_wire(service) as admin:
        await admin.call("volume.create", name="good", size_bytes=32 * MIB)
        images = service.directory / "state" / "volumes"
        (images / "zero.img").touch()
        (images / "short.img").write_bytes(30 * b"x")
        (images / "lost+found.img").write_bytes(30 * b"x")
        (images / f"{100 * 'x'}.img").write_bytes(30 * b"x")
        (images / os.fsdecode(b"\xff\n.img")).touch()
        (images / "directory.img").mkdir()
        (images / "link.img").symlink_to(images / "good.img")
        (images / "nowhere.img").symlink_to("nowhere")
        os.mkfifo(images / "fifo.img")
        for _ in range(2):
            assert list(await listed(admin)) == ["good"]
        await until(lambda: service.log_text().count("left out") == 9)
        told = [line for line in service.log_text().splitlines() if "left out" in line]
        assert len(told) == 9, told
        assert len([line for line in told if "'zero.img'" in line and "0 bytes" in line]) == 1
        assert "incident" not in service.log_text()
        (images / "zero.img").write_bytes(b"")
        out, _, _ = await admin.run("ls", "-d", "/volumes/good", volumes=having("good"))
        assert out == "/volumes/good\n"


async def test_reserved_volume_stays_so_in_a_copy_that_keeps_no_modes(
    open_directory: Callable[[], Path],
) -> None:
    """As `cp -r`, and `rsync` without -p, copy a state directory."""
    directory = open_directory()
    async with open_embedded(directory) as service, open_wire(service) as admin:
        await admin.call("volume.create", name="kept", size_bytes=20 * MIB)
        await admin.call("volume.create", name="thin", size_bytes=20 * MIB, thin=True)
    copy_without_modes(directory / "state" / "volumes")
    async with open_embedded(directory) as service, open_wire(service) as admin:
        assert {name: each["thin"] for name, each in (await listed(admin)).items()} == {
            "kept": False,
            "thin": True,
        }
        script = "cd /volumes/kept; head -c 12M /dev/zero > x; sync; rm x; sync"
        await admin.run("sh", "-c", script, volumes=having("kept"))
        assert (await listed(admin))["kept"]["used_bytes"] >= 20 * MIB


async def test_reserved_volume_of_an_earlier_version_gets_a_mark_that_lasts(
    open_directory: Callable[[], Path],
) -> None:
    directory = open_directory()
    image = directory / "state" / "volumes" / "kept.img"
    async with open_embedded(directory) as service, open_wire(service) as admin:
        await admin.call("volume.create", name="kept", size_bytes=20 * MIB)
    await trio.run_process(["tune2fs", "-L", "", str(image)], capture_stdout=True)
    async with open_embedded(directory) as service, open_wire(service) as admin:
        assert not (await listed(admin))["kept"]["thin"]
        await admin.run("true", volumes=having("kept"))
    copy_without_modes(image.parent)
    async with open_embedded(directory) as service, open_wire(service) as admin:
        assert not (await listed(admin))["kept"]["thin"]


def copy_without_modes(images: Path) -> None:
    copied = images.with_name("copied")
    copied.mkdir(0o700)
    for image in images.iterdir():
        shutil.copyfile(image, copied / image.name)
    shutil.rmtree(images)
    copied.rename(images)


@pytest.mark.parametrize(
    ("spoil", "remedy"),
    [
        ("truncate -s 18M {}", "cut short or damaged"),
        ("mv {0} {0}.away; ln -s {0}.away {0}", "is a link"),
        ("chattr +i {}", "chattr -i"),
    ],
)
async def test_volume_whose_image_was_spoilt_has_a_remedy_that_fits(
    open_directory: Callable[[], Path], spoil: str, remedy: str
) -> None:
    async with open_embedded(open_directory()) as service, open_wire(service) as admin:
        await admin.call("volume.create", name="v", size_bytes=20 * MIB)
        image = service.directory / "state" / "volumes" / "v.img"
        await trio.run_process(["sh", "-c", spoil.format(image)])
        try:
            _, _, record = await admin.run("true", volumes=having("v"))
            told = str(record)
        except Refused as error:
            told = f"{error} {error.data}"
        finally:
            await trio.run_process(["chattr", "-f", "-i", str(image)], check=False)
        assert remedy in told
