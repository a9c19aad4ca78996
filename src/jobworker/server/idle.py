"""Trio's `wait_all_tasks_blocked`, without the test framework that comes along with it.

It is public in `trio.testing` alone, which imports pytest where that is installed, for a class that
only tests use. That would be 0.15 s of a processor at each start of the service, and some 10 MB.
"""

import sys

_PYTEST = "pytest"

if _PYTEST in sys.modules:
    from trio.testing import wait_all_tasks_blocked
else:
    sys.modules[_PYTEST] = None  # type: ignore[assignment] # none to import: see sys.modules
    try:
        from trio.testing import wait_all_tasks_blocked
    finally:
        del sys.modules[_PYTEST]

__all__ = ["wait_all_tasks_blocked"]
