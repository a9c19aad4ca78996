"""Volumes: directories of a bounded size that outlive jobs. Frozen data with bounds."""

from attrs import field, frozen

from jobworker.model.bounds import states, within
from jobworker.model.checked_classes import raises_invalid_params
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
    """A validator of attrs for names of volumes. Raises ValueError."""
    if fault := name_fault(value):
        raise ValueError(fault)


def _check_place(_: object, __: object, value: str) -> None:
    if value and (fault := place_fault(value)):
        raise ValueError(fault)


@raises_invalid_params
@frozen(kw_only=True)
class VolumeMount:
    """A volume that is mounted in a job's root."""

    name: str = field(validator=check_name)
    path: str = field(default="", validator=_check_place)
    """The path of the mount in the job's root; "" is /volumes/NAME."""

    @property
    def place(self) -> str:
        """The path of the mount, also if `path` is ""."""
        return self.path or default_place(self.name)


@states(maxItems=MAX_VOLUMES)
def check_mounts(_: object, __: object, value: tuple[VolumeMount, ...]) -> None:
    """A validator of attrs: raises ValueError for a volume or path that is used twice, and for a
    mount inside of another one."""
    if len(value) > MAX_VOLUMES:
        raise ValueError(f"has {len(value)} volumes; at most {MAX_VOLUMES} are allowed")
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
    """A volume, as the server lists it."""

    name: str = field(validator=check_name)
    size_bytes: int = field(validator=within(MIN_DISK_BYTES, MAX_DISK_BYTES))
    used_bytes: int = field(default=0, validator=within(0, 1 << 60))
    """Bytes that the volume uses on the host's disk."""
    thin: bool = False
    """Whether the volume uses only the space that is written to it; else its size is reserved."""
    jobs: int = field(default=0, validator=within(0, 1 << 30))
    """Number of live jobs that use it."""
