"""Volumes: directories of a bounded size that outlive jobs. Frozen data with bounds."""

from attrs import field, frozen

from jobworker.model.bounds import states, within
from jobworker.model.made import told
from jobworker.storage import (
    MAX_DISK_BYTES,
    MAX_VOLUMES,
    MIN_DISK_BYTES,
    NAME_PATTERN,
    default_place,
    name_fault,
    place_fault,
)


@states(pattern=f"^{NAME_PATTERN}$")
def check_name(_: object, __: object, value: str) -> None:
    """Be a validator of attrs for names of volumes and runtimes."""
    if fault := name_fault(value):
        raise ValueError(fault)


def _check_place(_: object, __: object, value: str) -> None:
    if value and (fault := place_fault(value)):
        raise ValueError(fault)


@told
@frozen(kw_only=True)
class VolumeMount:
    """A volume in a job's root."""

    name: str = field(validator=check_name)
    path: str = field(default="", validator=_check_place)
    """Where; "" stands for /volumes/NAME."""

    @property
    def place(self) -> str:
        """Where, in any case."""
        return self.path or default_place(self.name)


@states(maxItems=MAX_VOLUMES)
def check_mounts(_: object, __: object, value: tuple[VolumeMount, ...]) -> None:
    """Be a validator of attrs: none twice, and none in the way of another one."""
    if len(value) > MAX_VOLUMES:
        raise ValueError(f"has {len(value)} volumes; at most {MAX_VOLUMES} are taken")
    names = [mount.name for mount in value]
    places = [mount.place for mount in value]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"names the volume {name!r} twice")
    for place in places:
        if places.count(place) > 1:
            raise ValueError(f"puts two volumes at {place}")
        if any(place.startswith(f"{other}/") for other in places):
            raise ValueError(f"puts a volume inside of another one, at {place}")


@frozen(kw_only=True)
class Volume:
    """A volume as it is."""

    name: str = field(validator=check_name)
    size_bytes: int = field(validator=within(MIN_DISK_BYTES, MAX_DISK_BYTES))
    used_bytes: int = field(default=0, validator=within(0, 1 << 60))
    """What it takes on the host's disk."""
    thin: bool = False
    """Whether it takes what is written to it, and not its size at once."""
    jobs: int = field(default=0, validator=within(0, 1 << 30))
    """How many live jobs have it."""
