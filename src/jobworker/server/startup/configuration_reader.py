"""The reader: a process with root's rights that reads the configuration and its files again.

The service has given up root and can read neither its key nor, often, its configuration. The reader
was forked before that, and keeps root's rights for this one task. It takes no arguments: a request
is a single byte, and only root can change the configuration that names the files. So an attacker
who has taken over the service learns nothing from the reader that was not in memory already.

The reader ends with the service: at the end of the stream, or by the kernel (PR_SET_PDEATHSIG,
prctl(2)).
"""

import base64
import os
import signal
import socket
import struct
import time
from pathlib import Path
from typing import NoReturn

import attrs
import trio
from attrs import define, field, frozen

from jobworker.config.settings import SecuritySettings, Settings, load
from jobworker.errors import ConfigError, JobworkerError, error_from_wire
from jobworker.pki.credentials import PemFile
from jobworker.pki.server_files import ServerFiles
from jobworker.sandbox import syscalls as sc
from jobworker.serialization.convert import structure, unstructure
from jobworker.serialization.json_text import dumps, loads
from jobworker.threads import in_thread

NAME = "worker-reader"
"""The name of its process in ps(1); at most 15 characters."""
READ_SECONDS = 10.0
_LENGTH = struct.Struct("!Q")
_FILES = tuple(attribute.name for attribute in attrs.fields(ServerFiles))


@frozen
class ConfigurationSnapshot:
    """The current contents of the files."""

    settings: Settings
    files: ServerFiles


def read_configured(config: Path | None) -> ConfigurationSnapshot:
    """Read the settings (the defaults if there is no file) and the files that they name.

    Raises ConfigError and CredentialsUnusable.
    """
    settings = Settings() if config is None else load(config)
    return ConfigurationSnapshot(settings, configured_files(settings.security))


def configured_files(security: SecuritySettings) -> ServerFiles:
    """Read the files that the configuration names. Raises CredentialsUnusable."""
    return ServerFiles.read(
        ca=Path(security.ca_cert),
        certificate=Path(security.server_cert),
        key=Path(security.server_key),
        crl=Path(security.crl) if security.crl else None,
    )


@define(eq=False)
class ConfigurationReader:
    """The service's side of the reader: asks its process to read, and checks that it lives."""

    _socket: socket.socket
    _pid: int
    _asking: trio.Lock = field(factory=trio.Lock)

    async def read(self) -> ConfigurationSnapshot:
        """Ask the reader to read the files, and return their contents.

        Raises what `read_configured` raises, and ConfigError if the reader is gone or stuck.
        """
        async with self._asking:
            answer = await self._ask()
        return await in_thread(_understand, answer)  # with a list of a megabyte 5 ms

    async def _ask(self) -> bytes:
        silent = ConfigError(
            "cannot read the configuration again: the process that may read it is gone or stuck",
            remedy="start the service anew",
        )
        try:
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(self._socket.dup()))
        except OSError:
            raise silent from None
        try:
            with trio.fail_after(READ_SECONDS):
                await stream.send_all(b"r")
                (length,) = _LENGTH.unpack(await _exactly(stream, _LENGTH.size))
                return await _exactly(stream, length)
        except (trio.TooSlowError, trio.BrokenResourceError, EOFError):
            self._socket.close()  # else a late answer would be taken for the next request's
            raise silent from None
        finally:
            await trio.aclose_forcefully(stream)

    async def wait_gone(self) -> None:
        """Wait until the reader's process ends; it should only end with the service."""
        pidfd = os.pidfd_open(self._pid)
        try:
            await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)

    def close(self) -> None:
        """End the reader and wait up to 2 s for it; if a dead disk holds it, the kernel ends it.

        The kernel does so when this process ends.
        """
        self._socket.close()
        for _ in range(200):
            if os.waitpid(self._pid, os.WNOHANG)[0]:
                return
            time.sleep(0.01)


def start_configuration_reader(config: Path | None) -> ConfigurationReader:
    """Fork the reader. Call it as root, before there are threads, locks or listeners."""
    path = None if config is None else config.absolute()
    near, far = socket.socketpair()
    service = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            _become_reader(far, path, service)
        finally:
            os._exit(1)
    far.close()
    near.setblocking(False)
    return ConfigurationReader(near, pid)


def _become_reader(sock: socket.socket, config: Path | None, service: int) -> NoReturn:
    sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != service:  # the service ended before the prctl above
        os._exit(0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a signal to the group is meant for the service
    signal.set_wakeup_fd(-1)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(null, standard)
    mine = sock.fileno()
    os.closerange(3, mine)
    os.closerange(mine + 1, os.sysconf("SC_OPEN_MAX"))
    Path("/proc/self/comm").write_text(NAME, encoding="ascii")
    while sock.recv(1):
        answer = _answer(config).encode()
        sock.sendall(_LENGTH.pack(len(answer)) + answer)
    os._exit(0)


def _answer(config: Path | None) -> str:
    try:
        reading = read_configured(config)
    except JobworkerError as error:
        told = {"code": error.code, "message": error.message, "remedy": error.remedy}
        return dumps({"error": told})
    except Exception as error:  # noqa: BLE001 - this process's boundary
        return dumps({"error": {"code": ConfigError.code, "message": f"cannot read: {error!r}"}})
    files = {
        name: [str(file.path), base64.b64encode(file.content).decode()]
        for name in _FILES
        if (file := getattr(reading.files, name)) is not None
    }
    return dumps({"settings": unstructure(reading.settings), "files": files})


def _understand(text: bytes) -> ConfigurationSnapshot:
    answer = loads(text.decode())
    assert isinstance(answer, dict)
    if "error" in answer:
        told = dict(answer["error"])
        raise error_from_wire(told.pop("code"), told.pop("message"), told)
    files = {
        name: PemFile(Path(path), base64.b64decode(content))
        for name, (path, content) in answer["files"].items()
    }
    return ConfigurationSnapshot(structure(Settings, answer["settings"]), ServerFiles(**files))


async def _exactly(stream: trio.SocketStream, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = await stream.receive_some(count - len(data))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)
