"""How many examples Hypothesis tries, and which."""

import os

from hypothesis import HealthCheck, settings

# The same ones in each run, so that a test which passed does not fail later by its luck; none is
# too slow, since the machine may be busy. `make soak` looks further, by other examples each time.
settings.register_profile(
    "usual",
    max_examples=40,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "soak",
    max_examples=1000,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("soak" if os.environ.get("JOBWORKER_SOAK") else "usual")
