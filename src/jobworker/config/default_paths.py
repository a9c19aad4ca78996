"""The default paths of a service: the host's directories for root, else the user's own.

Source: the XDG Base Directory Specification, and file-hierarchy(7) for root's.
"""

import os
from pathlib import Path


def default_state_directory() -> str:
    """The directory of history, output and jobs' files."""
    if os.geteuid() == 0:
        return "/var/lib/jobworker"
    return str(_own("XDG_STATE_HOME", ".local/state") / "jobworker")


def default_configuration() -> Path:
    """The path of the configuration file, which may not exist."""
    return _configuration() / "worker.toml"


def configuration_in_use() -> Path | None:
    """The path of the configuration file; None if it does not exist.

    If this user may not see whether it exists, the path is returned: the code that reads the file
    then reports the reason.
    """
    own = default_configuration()
    try:
        return own if own.exists() else None
    except OSError:
        return own


def default_certificate(name: str) -> str:
    """The path of the PEM file `name`."""
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
    # A user without a home has to configure paths: a use of this one fails and names it.
    return Path(home if home.startswith("/") else "/nonexistent") / below_home
