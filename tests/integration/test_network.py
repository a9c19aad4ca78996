"""Network modes: what a job reaches and may change, with the host's own network as the control."""

import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from .wire import Refused, Wire

CONNECT = """
import socket, sys
for place in sys.argv[1:]:
    host, port = place.rsplit("|", 1)
    try:
        with socket.create_connection((host, int(port)), 3) as reached:
            print(host, reached.recv(16).decode() or "nothing", flush=True)
    except OSError as error:
        print(host, "refused", flush=True)
"""


def addresses_of_the_host() -> list[str]:
    """Its addresses that are not loopback ones, as far as it has any."""
    found = []
    for family, probe in ((socket.AF_INET, "198.51.100.1"), (socket.AF_INET6, "2001:db8::1")):
        with socket.socket(family, socket.SOCK_DGRAM) as asking:
            try:
                asking.connect((probe, 9))
            except OSError:
                continue
            found.append(str(asking.getsockname()[0]))
    return found


@pytest.fixture
def host_servers() -> Iterator[dict[str, str]]:
    """Servers on every address of the host, by address: "ADDRESS|PORT", each says "greeting"."""

    def greet(listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.sendall(b"greeting")

    with ExitStack() as closing:
        places, threads = {}, []
        for family, anything in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
            listener = socket.create_server((anything, 0), family=family, backlog=64)
            closing.callback(listener.close)
            thread = threading.Thread(target=greet, args=(listener,))
            thread.start()
            threads.append((listener, thread))
            loopback = "127.0.0.1" if family == socket.AF_INET else "::1"
            mine = [a for a in addresses_of_the_host() if (":" in a) == (family != socket.AF_INET)]
            for address in (loopback, *mine):
                places[address] = f"{address}|{listener.getsockname()[1]}"
        yield places
        for listener, thread in threads:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


async def test_host_mode_is_the_control(admin: Wire, host_servers: dict[str, str]) -> None:
    out, err, job = await admin.run("python3", "-c", CONNECT, *host_servers.values())
    assert out.split() == [word for a in host_servers for word in (a, "greeting")], err
    assert "127.0.0.1" in host_servers
    spec = job["spec"]
    assert isinstance(spec, dict)
    assert spec["network"] == "host"


async def test_none_reaches_nothing_of_the_host(admin: Wire, host_servers: dict[str, str]) -> None:
    out, err, job = await admin.run(
        "python3", "-c", CONNECT, *host_servers.values(), network="none"
    )
    assert out.split() == [word for a in host_servers for word in (a, "refused")], err
    spec = job["spec"]
    assert isinstance(spec, dict)
    assert spec["network"] == "none"


async def test_none_has_a_loopback_and_nothing_else(admin: Wire) -> None:
    script = (
        "import socket\n"
        "print([name for _, name in socket.if_nameindex()])\n"
        "listener = socket.create_server(('127.0.0.1', 80))\n"
        "with socket.create_connection(('localhost', 80)): print('connected')\n"
        "with socket.create_server(('::1', 80), family=socket.AF_INET6) as six:\n"
        "    with socket.create_connection(('::1', 80)): print('connected')\n"
        "print(socket.gethostbyname(socket.gethostname()))\n"
    )
    out, err, _ = await admin.run("python3", "-c", script, network="none")
    assert out == "['lo']\nconnected\nconnected\n127.0.0.1\n", err


@pytest.mark.parametrize("uid", [0, 1000])
@pytest.mark.parametrize("network", ["none", "private"])
async def test_job_pings_in_a_network_of_its_own(admin: Wire, network: str, uid: int) -> None:
    script = """
import socket
for family, protocol, host, echo in ((2, 1, "127.0.0.1", 8), (10, 58, "::1", 128)):
    with socket.socket(family, socket.SOCK_DGRAM, protocol) as sock:
        sock.settimeout(20)
        sock.sendto(bytes([echo, *bytes(7)]) + b"anyone?", (host, 0))
        print(sock.recv(100)[8:])
"""
    out, err, _ = await admin.run("python3", "-c", script, network=network, uid=uid)
    assert out == "b'anyone?'\n" * 2, err


async def test_none_has_names_of_its_own(admin: Wire) -> None:
    out, _, job = await admin.run(
        "sh", "-c", "cat /etc/hosts; echo --; cat /etc/resolv.conf; ls -A /run", network="none"
    )
    hosts, _, rest = out.partition("--\n")
    assert re.search(rf"^127\.0\.0\.1 job-{job['id']}$", hosts, re.M)
    assert os.uname().nodename not in hosts.split()
    assert rest == "", "no resolver, and no trace of how it was made"
    out, _, _ = await admin.run("cat", "/etc/hosts", "/etc/resolv.conf")
    assert out == Path("/etc/hosts").read_text() + Path("/etc/resolv.conf").read_text()


@pytest.mark.parametrize("network", ["host", "none"])
async def test_network_cannot_be_configured(admin: Wire, network: str) -> None:
    script = """
import fcntl, os, socket, struct
def attempt(what, do):
    try:
        do()
    except OSError as error:
        print(what, "refused")
    else:
        print(what, "DONE")
control = socket.socket()
down = struct.pack("16sH22x", b"lo", 0)
attempt("down", lambda: fcntl.ioctl(control, 0x8914, down))
address = struct.pack("16sHH4s16x", b"lo:1", socket.AF_INET, 0, socket.inet_aton("10.9.9.9"))
attempt("address", lambda: fcntl.ioctl(control, 0x8916, address))
attempt("raw", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1))
attempt("packet", lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0))
attempt("sysctl", lambda: open("/proc/sys/net/ipv4/ip_forward", "w").write("1"))
def route():
    message = struct.pack("IHHII", 28 + 8 + 8, 24, 0x405, 1, 0)
    message += struct.pack("BBBBBBBBI", 2, 32, 0, 0, 254, 3, 253, 1, 0)
    message += struct.pack("HH4s", 8, 1, socket.inet_aton("10.9.9.9")) + struct.pack("HHI", 8, 4, 1)
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
    netlink.sendto(message, (0, 0))
    code = struct.unpack_from("i", netlink.recv(4096), 16)[0]
    if code:
        raise OSError(-code, "")
attempt("route", route)
"""
    out, err, _ = await admin.run("python3", "-c", script, network=network)
    words = ("down", "address", "raw", "packet", "sysctl", "route")
    assert out.split("\n")[:-1] == [f"{word} refused" for word in words], err


async def test_abstract_sockets_of_the_host_are_out_of_reach(admin: Wire) -> None:
    name = "\0jobworker-test-abstract"
    script = (
        "import socket\ns = socket.socket(socket.AF_UNIX)\n"
        "try: s.connect('\\0' + 'jobworker-test-abstract'); print('reached')\n"
        "except OSError: print('refused')\n"
    )
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(name)
        listener.listen()
        with socket.socket(socket.AF_UNIX) as control:
            control.connect(name)
        out, _, _ = await admin.run("python3", "-c", script, network="none")
        assert out == "refused\n"


async def test_unknown_network_is_refused_by_name(admin: Wire) -> None:
    with pytest.raises(Refused, match="network: must be one of host, none, private"):
        await admin.run("true", network="bridge")
