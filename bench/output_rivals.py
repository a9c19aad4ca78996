"""What output is measured beside: the same bytes over mutual TLS by other means.

    raw    a pair of Python's own TLS sockets, blocking, `sendall` and `recv_into`
    grpc   grpcio, server streaming, messages of bytes without protobuf

Each server is a process of its own: `python bench/output_rivals.py raw|grpc CERTS TOTAL CHUNK`
prints its port and serves until it is ended. Certificates are those that `worker certs init` makes.
"""

import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

MAX_MESSAGE = 64 << 20


def serve_raw(certs: Path, total: int, chunk: int) -> None:
    """Send `total` bytes to whoever connects."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(certs / "server-cert.pem", certs / "server-key.pem")
    context.load_verify_locations(certs / "ca-cert.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    data = bytes(chunk)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            plain, _ = listener.accept()
            with context.wrap_socket(plain, server_side=True) as connection:
                for _ in range(total // chunk):
                    connection.sendall(data)
                with suppress(OSError):  # the client may have gone at its last byte
                    connection.unwrap()


def receive_raw(certs: Path, port: int, total: int) -> int:
    """Receive it: how many bytes came."""
    context = _client_context(certs)
    buffer = bytearray(1 << 20)
    got = 0
    with (
        socket.create_connection(("127.0.0.1", port)) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        while got < total and (count := connection.recv_into(buffer)):
            got += count
    return got


def _client_context(certs: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=certs / "ca-cert.pem")
    context.load_cert_chain(certs / "admin-client-cert.pem", certs / "admin-client-key.pem")
    return context


def serve_grpc(certs: Path, total: int, chunk: int) -> None:
    """Stream `total` bytes to whoever calls."""
    import grpc  # type: ignore[import-untyped]

    data = bytes(chunk)

    def stream(_: bytes, __: object) -> Iterator[bytes]:
        for _number in range(total // chunk):
            yield data

    pair = ((certs / "server-key.pem").read_bytes(), (certs / "server-cert.pem").read_bytes())
    credentials = grpc.ssl_server_credentials(
        [pair], (certs / "ca-cert.pem").read_bytes(), require_client_auth=True
    )
    server = grpc.server(ThreadPoolExecutor(2), options=_options())
    handler = grpc.unary_stream_rpc_method_handler(stream)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("b", {"s": handler}),))
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    print(port, flush=True)
    server.wait_for_termination()


def receive_grpc(certs: Path, port: int, total: int) -> int:
    """Receive it: how many bytes came."""
    import grpc

    credentials = grpc.ssl_channel_credentials(
        (certs / "ca-cert.pem").read_bytes(),
        (certs / "admin-client-key.pem").read_bytes(),
        (certs / "admin-client-cert.pem").read_bytes(),
    )
    with grpc.secure_channel(f"localhost:{port}", credentials, options=_options()) as channel:
        got = sum(len(message) for message in channel.unary_stream("/b/s")(b""))
    assert got == total
    return got


def _options() -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", MAX_MESSAGE),
        ("grpc.max_send_message_length", MAX_MESSAGE),
    ]


@contextmanager
def rival(kind: str, certs: Path, total: int, chunk: int) -> Iterator[tuple[int, int]]:
    """A server in a process of its own: its process id and its port."""
    with subprocess.Popen(
        [sys.executable, __file__, kind, str(certs), str(total), str(chunk)],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            yield process.pid, int(process.stdout.readline())
        finally:
            process.kill()


RECEIVE: dict[str, Callable[[Path, int, int], int]] = {"raw": receive_raw, "grpc": receive_grpc}

if __name__ == "__main__":
    serve = {"raw": serve_raw, "grpc": serve_grpc}[sys.argv[1]]
    serve(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
