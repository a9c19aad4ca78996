"""Where a service keeps things by default: the host's places for root, else the user's own.

Source: the XDG Base Directory Specification, and file-hierarchy(7) for root's.
"""

import os
from pathlib import Path


def default_state_directory() -> str:
    """What the service must remember: history, output, jobs' files."""
    if os.geteuid() == 0:
        return "/var/lib/jobworker"
    return str(_own("XDG_STATE_HOME", ".local/state") / "jobworker")


def default_configuration() -> Path:
    """The configuration file, which need not exist."""
    return _configuration() / "worker.toml"


def configuration_in_use() -> Path | None:
    """The configuration file; None where there is none.

    One that this user may not look for counts as there: whoever reads it says why that fails.
    """
    own = default_configuration()
    try:
        return own if own.exists() else None
    except OSError:
        return own


def default_certificate(name: str) -> str:
    """The PEM file called `name`."""
    return str(_configuration() / "certs" / name)


def _configuration() -> Path:
    if os.geteuid() == 0:
        return Path("/etc/jobworker")
    return _own("XDG_CONFIG_HOME", ".config") / "jobworker"


def _own(variable: str, below_home: str) -> Path:
    chosen = os.environ.get(variable, "")
    # "If an implementation encounters a relative path … it should … ignore it."
    if chosen.startswith("/"):
        return Path(chosen)
    home = os.path.expanduser("~")
    # A user without a home has to name places: this one is refused by name when it is used.
    return Path(home if home.startswith("/") else "/nonexistent") / below_home
