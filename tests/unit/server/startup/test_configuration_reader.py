"""The reader: what it answers, and what the service makes of answers and of silence."""

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trio
import trio.testing
from attrs import evolve

from jobworker.config.settings import SecuritySettings, Settings
from jobworker.errors import ConfigError, CredentialsUnusable
from jobworker.pki.administration import init_authority
from jobworker.server.startup import configuration_reader
from jobworker.server.startup.configuration_reader import (
    READ_SECONDS,
    ConfigurationReader,
    configured_files,
    read_configured,
)


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site") / "certs"
    init_authority(directory, [], now=datetime.now(UTC))
    return directory


@pytest.fixture
def config(certs: Path, tmp_path: Path) -> Path:
    """A configuration that names these files, and no revocation list."""
    path = tmp_path / "worker.toml"
    path.write_text(
        "[server]\nport = 5000\n[security]\n"
        f'ca_cert = "{certs}/ca-cert.pem"\n'
        f'server_cert = "{certs}/server-cert.pem"\n'
        f'server_key = "{certs}/server-key.pem"\n'
        'crl = ""\n'
    )
    return path


class ReaderProcess:
    """The other end of a reader's socket, played."""

    def __init__(self) -> None:
        near, self.far = socket.socketpair()
        near.setblocking(False)
        self.reader = ConfigurationReader(near, os.getpid())

    async def answer(self, text: str, count: int | None = None) -> None:
        """Wait for a request, and answer with this text, or with its first bytes."""
        await trio.lowlevel.wait_readable(self.far)
        assert self.far.recv(100) == b"r", "a request is a single byte"
        data = text.encode()
        self.far.sendall((struct.pack("!Q", len(data)) + data)[:count])


@pytest.fixture
def process() -> Iterator[ReaderProcess]:
    process = ReaderProcess()
    yield process
    process.far.close()
    process.reader._socket.close()


async def test_service_gets_what_the_reader_reads(
    process: ReaderProcess, config: Path, certs: Path
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(process.answer, configuration_reader._answer(config))
        got = await process.reader.read()
    assert got == read_configured(config)
    assert got.settings.server.port == 5000
    assert got.files.key.content == (certs / "server-key.pem").read_bytes()
    assert got.files.certificate.path == certs / "server-cert.pem"
    assert got.files.crl is None


async def test_revocation_list_is_read_where_the_configuration_names_one(
    process: ReaderProcess, config: Path, certs: Path
) -> None:
    config.write_text(config.read_text().replace('crl = ""', f'crl = "{certs}/ca-crl.pem"'))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(process.answer, configuration_reader._answer(config))
        got = await process.reader.read()
    assert got.files.crl is not None
    assert got.files.crl.content == (certs / "ca-crl.pem").read_bytes()


def test_defaults_count_where_there_is_no_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = list[object]()
    monkeypatch.setattr(configuration_reader, "configured_files", read.append)
    assert read_configured(None).settings == Settings()
    assert read == [Settings().security]


async def test_error_of_the_reader_is_the_services(
    process: ReaderProcess, config: Path, certs: Path
) -> None:
    config.write_text(config.read_text().replace("server-key.pem", "missing.pem"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(process.answer, configuration_reader._answer(config))
        with pytest.raises(CredentialsUnusable, match=r"missing\.pem") as told:
            await process.reader.read()
    with pytest.raises(CredentialsUnusable) as own:
        read_configured(config)
    assert str(told.value) == str(own.value)
    assert told.value.remedy


async def test_unexpected_fault_of_the_reader_is_an_error_too(
    process: ReaderProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise ValueError("what is that")

    monkeypatch.setattr(configuration_reader, "read_configured", fail)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(process.answer, configuration_reader._answer(None))
        with pytest.raises(ConfigError, match="cannot read: ValueError"):
            await process.reader.read()


async def test_reader_that_is_gone_is_an_error(process: ReaderProcess) -> None:
    process.far.close()
    for _ in range(2):
        with pytest.raises(ConfigError, match="is gone or stuck") as refused:
            await process.reader.read()
        assert refused.value.remedy == "start the service anew"


async def test_reader_that_ends_before_its_answer_is_an_error(process: ReaderProcess) -> None:
    async with trio.open_nursery() as nursery:

        async def end() -> None:
            await process.answer("", 3)
            process.far.shutdown(socket.SHUT_WR)

        nursery.start_soon(end)
        with pytest.raises(ConfigError, match="is gone or stuck"):
            await process.reader.read()


@pytest.mark.parametrize("count", [0, 5, 12])
async def test_late_answer_is_taken_for_no_later_request(
    process: ReaderProcess, config: Path, count: int, autojump_clock: trio.testing.MockClock
) -> None:
    answer, began = configuration_reader._answer(config), trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(process.answer, answer, count)
        with pytest.raises(ConfigError, match="is gone or stuck"):
            await process.reader.read()
    assert trio.current_time() - began == pytest.approx(READ_SECONDS)
    with suppress(BrokenPipeError):
        process.far.sendall((struct.pack("!Q", len(answer)) + answer.encode())[count:])
    with pytest.raises(ConfigError, match="is gone or stuck"):
        await process.reader.read()


async def test_requests_take_turns(process: ReaderProcess, config: Path) -> None:
    got = list[object]()

    async def read() -> None:
        got.append(await process.reader.read())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        nursery.start_soon(read)
        for _ in range(2):
            await process.answer(configuration_reader._answer(config))
    assert got == [read_configured(config)] * 2


async def test_no_descriptor_is_left(process: ReaderProcess, config: Path) -> None:
    before = os.listdir("/proc/self/fd")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(process.answer, configuration_reader._answer(config))
        await process.reader.read()
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("name", ["ca_cert", "server_cert", "server_key", "crl"])
def test_every_file_of_the_configuration_is_read_from_where_it_says(certs: Path, name: str) -> None:
    security = evolve(
        SecuritySettings(),
        ca_cert=f"{certs}/ca-cert.pem",
        server_cert=f"{certs}/server-cert.pem",
        server_key=f"{certs}/server-key.pem",
        crl=f"{certs}/ca-crl.pem",
    )
    assert configured_files(security).crl is not None
    object.__setattr__(security, name, "/nowhere")
    with pytest.raises(CredentialsUnusable, match="/nowhere"):
        configured_files(security)
