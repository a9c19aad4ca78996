"""What may stand in a configuration file: settings, or a ConfigError that says why not."""

import os
import sys
from pathlib import Path

try:
    import atheris
except ImportError:  # the seeds and their mutations run without it, see tests/unit/test_fuzz.py
    atheris = None

if atheris is not None:
    with atheris.instrument_imports():
        from jobworker.config.settings import Settings, load
        from jobworker.errors import ConfigError
else:
    from jobworker.config.settings import Settings, load
    from jobworker.errors import ConfigError


def one(data: bytes) -> None:
    """Try one input; raises what must never be raised."""
    memory = os.memfd_create("fuzz", os.MFD_CLOEXEC)
    try:
        os.write(memory, data)
        settings = load(Path(f"/proc/self/fd/{memory}"))
    except ConfigError as error:
        str(error).encode("utf-8", "surrogateescape")
    else:
        assert isinstance(settings, Settings)
        assert settings.limits.max_connections >= 1
        assert settings.worker.state_dir.startswith("/")
    finally:
        os.close(memory)


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
