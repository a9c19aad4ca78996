"""Run other people's commands on a Linux host without giving those people the host.

The names of the Python API are imported at their first use, because the launcher imports this
package and must load nothing but the standard library. `__init__.pyi` declares their types.
"""

__version__ = "0.1.0"

_EXPORTS = {
    "Chunk": "jobworker.client.following",
    "Client": "jobworker.client.client",
    "Job": "jobworker.client.job",
    "JobOutput": "jobworker.client.job",
    "JobRecord": "jobworker.model.job",
    "JobSpec": "jobworker.model.job",
    "JobStatus": "jobworker.model.job",
    "JobworkerError": "jobworker.errors",
    "Limits": "jobworker.model.job",
    "PruneParams": "jobworker.protocol.messages",
    "State": "jobworker.model.lifecycle",
    "Stream": "jobworker.model.job",
    "VolumeMount": "jobworker.model.volumes",
    "open_client": "jobworker.client.opening",
}
__all__ = ["__version__", *sorted(_EXPORTS)]  # noqa: PLE0604 - all of them are names


def __dir__() -> list[str]:
    return [*globals(), *_EXPORTS]


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    found: object = getattr(import_module(_EXPORTS[name]), name)
    return found
