"""What holds for all tests."""

import signal


def pytest_configure() -> None:
    """Have Ctrl-C mean something: whoever runs the tests in the background ignores it.

    An ignored signal stays ignored through execve(2), so that neither the service nor
    a client that a test starts could be interrupted.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
