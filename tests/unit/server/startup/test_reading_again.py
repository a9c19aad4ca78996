"""The reader's answer may be a megabyte: where it is decoded."""

import os
import socket
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trio

from jobworker.pki.administration import init_authority
from jobworker.server.startup import configuration_reader
from jobworker.server.startup.configuration_reader import ConfigurationReader, ConfigurationSnapshot


async def test_event_loop_does_not_decode_what_the_reader_has_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certs = tmp_path / "certs"
    init_authority(certs, [], now=datetime.now(UTC))
    config = tmp_path / "worker.toml"
    config.write_text(
        f'[security]\nca_cert = "{certs}/ca-cert.pem"\nserver_cert = "{certs}/server-cert.pem"\n'
        f'server_key = "{certs}/server-key.pem"\ncrl = "{certs}/ca-crl.pem"\n'
    )
    threads = list[threading.Thread]()
    really = configuration_reader._understand

    def understand(answer: bytes) -> ConfigurationSnapshot:
        threads.append(threading.current_thread())
        return really(answer)

    monkeypatch.setattr(configuration_reader, "_understand", understand)
    near, far = socket.socketpair()
    near.setblocking(False)
    with near, trio.socket.from_stdlib_socket(far) as process:

        async def answer() -> None:
            assert await process.recv(1) == b"r"
            said = configuration_reader._answer(config).encode()
            await trio.SocketStream(process).send_all(
                configuration_reader._LENGTH.pack(len(said)) + said
            )

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            snapshot = await ConfigurationReader(near, os.getpid()).read()
    assert snapshot.files.ca.content == (certs / "ca-cert.pem").read_bytes()
    assert threads
    assert threading.main_thread() not in threads
