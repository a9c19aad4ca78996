"""The configuration of runtimes: root trees that jobs may ask for by name."""

from collections.abc import Mapping

from attrs import field, frozen

from jobworker.storage import name_fault


def check_runtime_names(_: object, __: object, value: Mapping[str, object]) -> None:
    """A validator of attrs: raises ValueError for names that no runtime may have."""
    for name in value:
        if fault := name_fault(name):
            raise ValueError(fault)


def _check_path(_: object, __: object, value: str) -> None:
    if not value.startswith("/") or "/../" in f"{value}/" or "\0" in value or not value.strip("/"):
        raise ValueError(f"must be the absolute path of a root tree, not {value!r}")


@frozen(kw_only=True)
class RuntimeSettings:
    """The settings of one runtime."""

    path: str = field(validator=_check_path)
