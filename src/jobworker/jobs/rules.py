"""What holds for every job of a service: the settings of the configuration, and the clock."""

from collections.abc import Callable
from datetime import datetime

from attrs import frozen

from jobworker.model.job import Limits, OutputPolicy

Clock = Callable[[], datetime]


@frozen(kw_only=True)
class Rules:
    """The settings of the configuration for every job."""

    defaults: Limits
    timeout_seconds: float
    stop_grace_seconds: float
    at_max_output: OutputPolicy
    on_disk_full: OutputPolicy
