"""The tree of errors: one class for each situation that a caller can be in.

Every class carries its wire code (JSON-RPC 2.0, section 5.1, reserves -32768 to -32000; ours start
at 1000), the exit code of `worker-cli`, and a stable name for programs. The message names what
failed and why; `remedy` names what to do.

Standard library only: the launcher raises these errors too.
"""

from collections.abc import Mapping
from typing import ClassVar

MOST_QUOTED = 300
"""Characters of a client's value that a message quotes: a few lines, enough to recognize it."""


def shortened(text: str) -> str:
    """Cut a client's value to `MOST_QUOTED` characters: an argument may have 128 KiB."""
    return text if len(text) <= MOST_QUOTED else text[:MOST_QUOTED] + "…"


class JobworkerError(Exception):
    """An error that a caller can act on.

    `message` is one line, "cannot X: reason". `remedy` is the advice what to do, or "" where there
    is none. `data` is sent to the client beside the message: JSON values only, and nothing that the
    client may not see.
    """

    code: ClassVar[int] = -32603
    exit_code: ClassVar[int] = 70
    name: ClassVar[str] = "internal"

    def __init__(
        self, message: str, *, remedy: str = "", data: Mapping[str, object] | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        self.data: dict[str, object] = dict(data or {})

    def __str__(self) -> str:
        return f"{self.message}; {self.remedy}" if self.remedy else self.message


class InternalError(JobworkerError):
    """An unexpected fault: the client gets an incident id, and the log has the traceback."""


class OutputError(InternalError):
    """A job's output cannot be stored or read: disk full or failing, or files changed by others.

    `__cause__` is the OSError where there is one.
    """

    code = 1040
    exit_code = 81
    name = "output_failed"


class FollowerStalled(JobworkerError):
    """The follower read too slowly, so its subscription ended; it can resume at its offset."""

    code = 1041
    exit_code = 82
    name = "follower_stalled"


# --- the wire -------------------------------------------------------------------------------


class ProtocolError(JobworkerError):
    """A message that is not JSON-RPC 2.0, or that is not allowed at this moment."""

    code = -32600
    exit_code = 76
    name = "invalid_request"


class NoUpgrade(ProtocolError):
    """An HTTP request that opens no WebSocket of this protocol; the remedy names what it lacks."""

    code = 1050
    name = "no_upgrade"


class MalformedJSON(ProtocolError):
    """A message that is not strict JSON (RFC 8259, and no duplicate keys)."""

    code = -32700
    name = "parse_error"


class UnknownMethod(ProtocolError):
    """The protocol has no method of this name."""

    code = -32601
    name = "method_not_found"


class InvalidParams(JobworkerError, ValueError):
    """A value that is missing, of the wrong type or out of bounds; the message names its path."""

    code = -32602
    exit_code = 65
    name = "invalid_params"


class TooLarge(JobworkerError):
    """A request beyond a bound on size, such as 1 MiB of arguments and environment."""

    code = 1001
    exit_code = 79
    name = "too_large"


class MessageTooLarge(TooLarge):
    """A message beyond the bound on its size; the connection is closed with code 1009."""

    code = 1014
    name = "message_too_large"


class PermissionDenied(JobworkerError):
    """The caller's role does not permit the operation."""

    code = 1002
    exit_code = 77
    name = "permission_denied"


class NotFound(JobworkerError):
    """No such job, or none that the caller may see."""

    code = 1003
    exit_code = 66
    name = "not_found"


class Busy(JobworkerError):
    """A queue or a limit is full; the same request may pass later."""

    code = 1004
    exit_code = 75
    name = "busy"


class TooManyConnections(Busy):
    """The service, or this name, has as many connections as the limits allow."""

    code = 1006
    name = "too_many_connections"


class TooManyRequests(Busy):
    """This connection, or this name, has as many requests in flight as the limits allow."""

    code = 1007
    name = "too_many_requests"


class TooManyFollows(Busy):
    """This connection, or this name, follows as many outputs as the limits allow."""

    code = 1008
    name = "too_many_follows"


class TooManyFrames(Busy):
    """The client sends control frames, or short parts of messages, faster than is allowed."""

    code = 1034
    name = "too_many_frames"


class TooManyFailures(Busy):
    """Too many handshakes of this address failed within a minute, and too many wait for a turn."""

    code = 1009
    name = "too_many_failures"


class OutOfDescriptors(Busy):
    """The service has no file descriptor left for this; the same request may pass later."""

    code = 1028
    name = "no_descriptors"


class QuotaExceeded(Busy):
    """The caller's quota is used up; `data` names the quota, its limit, and how much is used."""

    code = 1019
    name = "quota_exceeded"


class TooManyHandshakes(Busy):
    """The handshake was not over when newer connections needed its place."""

    code = 1025
    name = "too_many_handshakes"


class ShuttingDown(Busy):
    """The service is shutting down and accepts no new work."""

    code = 1005
    name = "shutting_down"


class TooSlow(JobworkerError):
    """The client did not send, read or answer in time; its connection is closed."""

    code = 1015
    exit_code = 69
    name = "too_slow"


class HandshakeTooSlow(TooSlow):
    """TLS handshake and HTTP request took longer than the limits allow."""

    code = 1016
    name = "handshake_too_slow"


class PingUnanswered(TooSlow):
    """The client did not answer a ping within the limits."""

    code = 1017
    name = "ping_unanswered"


class SendStalled(TooSlow):
    """The client read nothing of what was sent to it for longer than the limits allow."""

    code = 1018
    name = "send_stalled"


# --- starting a job -------------------------------------------------------------------------


class SandboxError(JobworkerError):
    """A step of a job's start failed; nothing of the job is left. `data["step"]` names it."""

    code = 1010
    exit_code = 71
    name = "sandbox"


class CommandNotFound(SandboxError):
    """The job's executable does not exist inside its root (exit code 127, as in a shell)."""

    code = 1011
    exit_code = 127
    name = "command_not_found"


class CommandNotExecutable(SandboxError):
    """The executable exists but cannot be executed: mode, format or a missing interpreter."""

    code = 1012
    exit_code = 126
    name = "command_not_executable"


class LauncherGone(JobworkerError):
    """The launcher process has ended: no job can be started or stopped until a restart."""

    code = 1013
    exit_code = 71
    name = "launcher_gone"


class LauncherSilent(JobworkerError):
    """The launcher runs but does not answer: it is stopped, or the host is overloaded."""

    code = 1026
    exit_code = 71
    name = "launcher_silent"


# --- reaching a server ----------------------------------------------------------------------


class ConnectionFailed(JobworkerError):
    """Nothing answers at the address, or the connection broke."""

    code = 1020
    exit_code = 69
    name = "connection_failed"


class HostUnknown(ConnectionFailed):
    """The server's name does not resolve."""

    code = 1021
    exit_code = 68
    name = "host_unknown"


class NoService(ConnectionFailed):
    """The server at the address is no jobworker service: it has no TLS, or another protocol."""

    code = 1029
    name = "no_service"


class CertificateRefused(JobworkerError):
    """The server refused this client's certificate, or the client sent none."""

    code = 1022
    exit_code = 67
    name = "certificate_refused"


class ServerUntrusted(JobworkerError):
    """The server's certificate is not from the client's CA, has expired, or names another host."""

    code = 1023
    exit_code = 74
    name = "server_untrusted"


class CredentialsUnusable(JobworkerError):
    """A certificate, key or CA file is missing, unreadable or malformed, or they do not match."""

    code = 1024
    exit_code = 72
    name = "credentials_unusable"


class LoopMissing(JobworkerError):
    """The Python client was called outside of a Trio event loop, for example from asyncio."""

    code = 1033
    exit_code = 64
    name = "loop_missing"


class PrintFailed(JobworkerError):
    """Standard output is closed, or a write to it or to standard error fails (disk full)."""

    code = 1042
    exit_code = 83
    name = "print_failed"


# --- setting up -----------------------------------------------------------------------------


class ConfigError(JobworkerError):
    """The configuration cannot be read or has invalid values; the message names all of them."""

    code = 1030
    exit_code = 78
    name = "configuration"


class AddressUnavailable(JobworkerError):
    """The service cannot listen at its address: in use, reserved, or not of this host."""

    code = 1031
    exit_code = 73
    name = "address_unavailable"


class HostUnsupported(JobworkerError):
    """This host lacks something that the configuration asks for, such as a controller."""

    code = 1032
    exit_code = 80
    name = "host_unsupported"


def error_classes() -> dict[int, type[JobworkerError]]:
    """Return all error classes by wire code."""
    found: dict[int, type[JobworkerError]] = {}
    waiting: list[type[JobworkerError]] = [InternalError]
    waiting.extend(JobworkerError.__subclasses__())
    while waiting:
        cls = waiting.pop()
        found.setdefault(cls.code, cls)
        waiting.extend(cls.__subclasses__())
    return found


def error_from_wire(code: int, message: str, data: Mapping[str, object]) -> JobworkerError:
    """Make the error that a reply's error object describes; `InternalError` for unknown codes."""
    cls = error_classes().get(code, InternalError)
    rest = dict(data)
    remedy = rest.pop("remedy", "")
    rest.pop("name", None)
    return cls(message, remedy=remedy if isinstance(remedy, str) else "", data=rest)
