"""Trio's `wait_all_tasks_blocked`, imported without pytest.

Trio has this function only in `trio.testing`. That module imports pytest if it is installed, for a
class that only tests use. The import would cost 0.15 s of processor time at each start of the
service, and some 10 MB of memory.
"""

import sys

_PYTEST = "pytest"

if _PYTEST in sys.modules:
    from trio.testing import wait_all_tasks_blocked
else:
    sys.modules[_PYTEST] = None  # type: ignore[assignment] # makes its import fail: see sys.modules
    try:
        from trio.testing import wait_all_tasks_blocked
    finally:
        del sys.modules[_PYTEST]

__all__ = ["wait_all_tasks_blocked"]
