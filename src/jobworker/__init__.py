"""Run other people's commands on a Linux host without giving those people the host.

The client's names are loaded when they are first asked for: the launcher imports this package
with nothing but the standard library. Their types stand in `__init__.pyi`.
"""

from importlib import import_module

__version__ = "0.1.0"

_EXPORTS = {
    "Client": "jobworker.client.client",
    "open_client": "jobworker.client.opening",
    "Job": "jobworker.client.job",
    "JobSpec": "jobworker.model.job",
    "Limits": "jobworker.model.job",
}


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(import_module(_EXPORTS[name]), name)
    return found
