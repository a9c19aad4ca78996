"""Whoever should not get in is told why at once, and so is the log; the service lives on.

Each attempt has its control: the same certificate with the one fault mended gets in. What is tried
upon the running service stands first; what changes its files has a service of its own, below.
"""

import hashlib
import json
import os
import re
import signal
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio
import trio_websocket
from cryptography.x509.oid import ExtendedKeyUsageOID

from jobworker.cli.worker.embedded_service import EmbeddedService, program
from jobworker.client.address import parse_address
from jobworker.client.client import Client
from jobworker.client.dial import serve_connection
from jobworker.client.opening import open_client
from jobworker.errors import (
    CertificateRefused,
    ConnectionFailed,
    JobworkerError,
    PermissionDenied,
    ServerUntrusted,
)
from jobworker.model.job import JobSpec
from jobworker.model.lifecycle import State
from jobworker.pki import administration
from jobworker.pki.administration import init_authority
from jobworker.pki.authority import Authority

from ..integration.conftest import running, until
from ..integration.wire import context_for, open_socket, open_wire
from ..services import write_configuration
from .conftest import ROLES
from .forgery import CN, OU, Forger, O, Subject, bare_context, good_name

LONG_AGO = datetime.now(UTC) - timedelta(days=400)
UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    b"Sec-WebSocket-Protocol: jobworker.v1\r\n\r\n"
)
CHATTER = JobSpec(command=("sh", "-c", "while :; do echo alive; sleep 0.05; done"))
PROMPTLY = 9
"""Seconds, on a busy machine; what hangs would take ten or more."""


@pytest.fixture(scope="module")
def house(open_directory: Callable[[], Path]) -> Iterator[EmbeddedService]:
    """A service whose authority began long ago."""
    if os.geteuid() != 0:
        pytest.skip("needs root: namespaces and control groups")
    directory = open_directory()
    init_authority(directory / "certs", [], now=LONG_AGO, days=4000, ca_days=4000)
    with running(directory, ROLES) as made:
        yield made


@pytest.fixture
def forger(house: EmbeddedService) -> Forger:
    certs = house.directory / "certs"
    return Forger(Authority.load(certs), certs)


async def dialled(service: EmbeddedService, tls: ssl.SSLContext) -> JobworkerError | None:
    """What a client's user is told, with `tls` for its context; None where it gets in."""
    with trio.fail_after(PROMPTLY):
        async with trio.open_nursery() as nursery:
            try:
                await nursery.start(serve_connection, parse_address(service.address), tls)
            except JobworkerError as error:
                return error
            finally:
                nursery.cancel_scope.cancel()
    return None


async def log_tells(service: EmbeddedService, *words: str) -> None:
    """Wait until a line of the log has an address of the peer's and all the words."""

    def told() -> bool:
        return any(
            re.search(r"127\.0\.0\.1:\d+: ", line) and all(word in line for word in words)
            for line in service.log_text().splitlines()
        )

    await until(told)


async def refused(
    service: EmbeddedService, tls: ssl.SSLContext, kind: type[JobworkerError], client: str, log: str
) -> None:
    error = await dialled(service, tls)
    assert type(error) is kind, error
    assert client in error.message
    assert error.remedy
    await log_tells(service, log)
    async with open_wire(service) as admin:
        assert (await admin.call("service.hello"))["role"] == "admin"


# --- certificates ---------------------------------------------------------------------------


async def test_sound_certificate_gets_in(house: EmbeddedService, forger: Forger) -> None:
    """The control of all that follow."""
    assert await dialled(house, forger.context()) is None


async def test_no_certificate(house: EmbeddedService) -> None:
    await refused(
        house,
        bare_context(house.directory / "certs" / "ca-cert.pem"),
        CertificateRefused,
        "asks for a client certificate and got none",
        "the client sent no certificate",
    )


async def test_certificate_of_another_authority(
    house: EmbeddedService, forger: Forger, tmp_path: Path
) -> None:
    """The stranger's CA bears the very name of ours."""
    root = forger.authority.root.certificate
    stranger = Authority.create(now=LONG_AGO, days=4000)
    context = Forger(stranger, tmp_path).context(trusting=forger.directory / "ca-cert.pem")
    await refused(
        house, context, CertificateRefused, "not from the server's CA", "was refused: unable to get"
    )
    named_alike = Forger(
        Authority(root=type(stranger.root)(certificate=root, key=stranger.root.key)), tmp_path
    )
    error = await dialled(house, named_alike.context(trusting=forger.directory / "ca-cert.pem"))
    assert isinstance(error, CertificateRefused)


async def test_expired_certificate(house: EmbeddedService, forger: Forger) -> None:
    context = forger.context(valid=(-timedelta(days=2), -timedelta(seconds=1)))
    await refused(
        house, context, CertificateRefused, "has expired", "refused: certificate has expired"
    )


async def test_certificate_that_is_not_valid_yet(house: EmbeddedService, forger: Forger) -> None:
    context = forger.context(valid=(timedelta(hours=1), timedelta(hours=2)))
    await refused(house, context, CertificateRefused, "is not valid yet", "not yet valid")


async def test_server_certificate_as_a_client_certificate(
    house: EmbeddedService, forger: Forger
) -> None:
    context = forger.context(purpose=ExtendedKeyUsageOID.SERVER_AUTH)
    await refused(house, context, CertificateRefused, "is not made for clients", "purpose")


@pytest.mark.parametrize("key", ["rsa1024", "rsa2048"])
async def test_weak_key(house: EmbeddedService, forger: Forger, key: str) -> None:
    context = forger.context(key=key)  # type: ignore[arg-type]
    if key == "rsa2048":
        assert await dialled(house, context) is None
        return
    await refused(house, context, CertificateRefused, "too weak", "EE certificate key too weak")


async def test_weak_signature(house: EmbeddedService, forger: Forger) -> None:
    context = forger.context(sha1=True)
    await refused(house, context, CertificateRefused, "too weak", "CA signature digest algorithm")


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
@pytest.mark.parametrize("version", ["TLSv1", "TLSv1_1", "TLSv1_2"])
async def test_older_tls(house: EmbeddedService, forger: Forger, version: str) -> None:
    context = forger.context()
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    await refused(
        house, context, ConnectionFailed, "does not offer TLS", "no TLS version that is allowed"
    )


CURVES = ["X25519", "P-256", "X448", "P-521", "P-384"]
FINITE_FIELDS = ["ffdhe2048", "ffdhe3072", "ffdhe4096", "ffdhe6144", "ffdhe8192"]


@pytest.mark.parametrize("group", [*CURVES, *FINITE_FIELDS])
async def test_key_exchange_that_costs_the_service_much(house: EmbeddedService, group: str) -> None:
    """Before it knows anything of a client: 170 ms of its loop for the longest."""
    certs = house.directory / "certs"
    named = ["-cert", f"{certs}/admin-client-cert.pem", "-key", f"{certs}/admin-client-key.pem"]
    said = await trio.run_process(
        ["openssl", "s_client", "-connect", house.address, "-groups", group, "-brief", *named],
        stdin=b"",
        capture_stdout=True,
        capture_stderr=True,
        check=False,
    )
    told = said.stderr.decode()
    assert ("CONNECTION ESTABLISHED" in told) is (group in CURVES), told
    assert ("handshake failure" in told) is (group in FINITE_FIELDS), told


@pytest.mark.parametrize("fault", ["not valid yet: it begins at", "RSA key has 1024 bits"])
def test_user_of_worker_cli_is_told_which_of_the_causes_it_is(
    house: EmbeddedService, forger: Forger, fault: str
) -> None:
    """TLS has one alert for several causes; the client looks at its own file."""
    if "1024" in fault:
        forger.context(key="rsa1024")
    else:
        forger.context(valid=(timedelta(hours=1), timedelta(hours=2)))
    path = forger.directory / "forged-1.pem"
    path.chmod(0o600)  # or that would be told too
    names = {**house.environment(), "WORKER_CERT_PATH": str(path), "WORKER_KEY_PATH": str(path)}
    done = subprocess.run(
        [*program("worker-cli"), "ping"],
        capture_output=True,
        text=True,
        env={**os.environ, **names},
        timeout=60,
        check=False,
    )
    (line,) = done.stderr.splitlines()
    if "1024" in fault:  # our own client does not even offer it
        assert (done.returncode, "too weak" in line) == (72, True)
    else:
        assert (done.returncode, fault in line) == (67, True), line


async def test_host_name_that_the_server_does_not_bear(house: EmbeddedService) -> None:
    names = house.environment()
    address = parse_address(house.address)
    with pytest.raises(ServerUntrusted, match="is for another name"), trio.fail_after(PROMPTLY):
        async with open_client(
            f"127.1:{address.port}",  # resolves to 127.0.0.1, and is no name of the certificate
            ca=names["WORKER_CA_PATH"],
            certificate=names["WORKER_CERT_PATH"],
            key=names["WORKER_KEY_PATH"],
        ):
            pass
    await log_tells(house, "the client refused this server")


# --- roles and names ------------------------------------------------------------------------

BAD_SUBJECTS: dict[str, Subject] = {
    "no OU": [[(CN, "mallory")]],
    "two OUs": [[(OU, "viewer")], [(OU, "admin")], [(CN, "mallory")]],
    "two OUs, the same": [[(OU, "admin")], [(OU, "admin")], [(CN, "mallory")]],
    "two OUs in one relative name": [[(OU, "viewer"), (OU, "admin")], [(CN, "mallory")]],
    "wrong case": good_name(role="Admin"),
    "capitals": good_name(role="ADMIN"),
    "space before": good_name(role=" admin"),
    "space after": good_name(role="admin "),
    "no-break space after": good_name(role="admin\u00a0"),
    "line end after": good_name(role="admin\n"),
    "Cyrillic a": good_name(role="\u0430dmin"),
    "full-width a": good_name(role="\uff41dmin"),
    "zero-width space": good_name(role="ad\u200bmin"),
    "soft hyphen": good_name(role="ad\u00admin"),
    "right-to-left": good_name(role="\u202enimda"),
    "NUL after": good_name(role="admin\0"),
    "NUL and more after": good_name(role="admin\0.evil"),
    "list of roles": good_name(role="viewer,admin"),
    "unknown role": good_name(role="root"),
    "OU inside the CN": [[(CN, "mallory/OU=admin")]],
    "OU inside the CN, with commas": [[(CN, "mallory, OU=admin")]],
    "OU inside the CN, with line end": [[(CN, "mallory\nOU = admin")]],
    "OU inside the O": [[(O, "x,OU=admin")], [(CN, "mallory")]],
    "role in the O": [[(O, "admin")], [(CN, "mallory")]],
    "two CNs": [[(OU, "admin")], [(CN, "mallory")], [(CN, "alice")]],
    "no CN": [[(OU, "admin")]],
    "unseen in the CN": good_name(name="alice\u200b"),
    "line end in the CN": good_name(name="alice\nforged"),
}


@pytest.mark.parametrize("fault", BAD_SUBJECTS)
async def test_subject_that_gives_no_role(
    house: EmbeddedService, forger: Forger, fault: str
) -> None:
    error = await dialled(house, forger.context(BAD_SUBJECTS[fault]))
    assert isinstance(error, PermissionDenied), error
    assert "certificate" in error.message
    assert "\n" not in error.message
    await log_tells(house, "refused: cannot")


async def test_place_of_the_ou_in_the_subject_does_not_matter(
    house: EmbeddedService, forger: Forger
) -> None:
    """The control of the above."""
    for subject in (
        [[(CN, "mallory")], [(OU, "admin")]],
        [[(CN, "mallory"), (OU, "admin")]],
        [[(O, "OU=viewer")], [(OU, "admin")], [(CN, "OU=viewer")]],
    ):
        assert await dialled(house, forger.context(subject)) is None


# --- revocation, reload -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def fresh(open_directory: Callable[[], Path]) -> Iterator[EmbeddedService]:
    """A service whose files a test may change, and then puts back as they were."""
    if os.geteuid() != 0:
        pytest.skip("needs root: namespaces and control groups")
    with running(open_directory(), ROLES) as made:
        yield made


def worker(*arguments: str) -> str:
    done = subprocess.run(
        [*program("worker"), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout


def certs(service: EmbeddedService, *arguments: str) -> str:
    return worker("certs", *arguments, f"--dir={service.directory / 'certs'}")


def issue(service: EmbeddedService, name: str, role: str) -> None:
    directory, now = service.directory / "certs", datetime.now(UTC)
    administration.issue_client(directory, Authority.load(directory), name=name, role=role, now=now)


def revoke(service: EmbeddedService, name: str) -> None:
    directory, now = service.directory / "certs", datetime.now(UTC)
    administration.revoke(directory, Authority.load(directory), name, now=now)


async def reload(service: EmbeddedService, told: str = " INFO reloaded: ") -> None:
    """SIGHUP, and wait for what the log says of it."""
    before = service.log_text().count(told)
    service.process.send_signal(signal.SIGHUP)
    await until(lambda: service.log_text().count(told) > before)


async def test_revoked_certificate_is_out_at_once_and_stays_out(fresh: EmbeddedService) -> None:
    certs(fresh, "issue", "--name=eve", "--role=admin")
    files = {
        "ca": fresh.directory / "certs" / "ca-cert.pem",
        "certificate": fresh.directory / "certs" / "eve-cert.pem",
        "key": fresh.directory / "certs" / "eve-key.pem",
    }

    def dial() -> AbstractAsyncContextManager[Client]:
        return open_client(
            fresh.address, ca=files["ca"], certificate=files["certificate"], key=files["key"]
        )

    async def follow() -> None:
        async with dial() as client:
            job = await client.run(CHATTER)
            assert "Revoked" in certs(fresh, "revoke", "eve", "--reason=keyCompromise")
            assert (await client.hello()).name == "eve"  # the service was not told yet
            with trio.fail_after(PROMPTLY):
                told = False
                async for _ in job.output():
                    if not told:
                        fresh.process.send_signal(signal.SIGHUP)  # in mid-stream
                    told = True

    async with open_wire(fresh, "viewer") as other:
        with pytest.raises(CertificateRefused, match=r"this connection: .*revoked"):
            await follow()
        await log_tells(fresh, "ended: eve", "revoked")
        assert (await other.call("service.hello"))["name"] == "viewer-client"  # unharmed
        jobs = (await other.call("job.list", states=["RUNNING"]))["jobs"]
        assert isinstance(jobs, list)
        assert len(jobs) == 1
    with pytest.raises(CertificateRefused, match="has been revoked"), trio.fail_after(PROMPTLY):
        async with dial():
            pass
    await log_tells(fresh, "refused: certificate revoked")


async def until_refused(client: Client) -> None:
    while True:
        await client.hello()


async def test_client_goes_on_with_the_files_that_took_the_place_of_the_old(
    fresh: EmbeddedService, tmp_path: Path
) -> None:
    """A follower and a waiter, over a renewal and the revocation of the old certificate."""

    def place(name: str) -> None:
        for kind in ("cert", "key"):
            new = tmp_path / f"new-{kind}.pem"
            new.write_bytes((fresh.directory / "certs" / f"{name}-{kind}.pem").read_bytes())
            new.rename(tmp_path / f"{kind}.pem")

    for name in ("mia", "mia-anew"):
        issue(fresh, name, "admin")
    place("mia")
    seen, breaks = list[int](), list[str]()
    async with open_client(
        fresh.address,
        ca=fresh.directory / "certs" / "ca-cert.pem",
        certificate=tmp_path / "cert.pem",
        key=tmp_path / "key.pem",
    ) as client:
        job = await client.run(CHATTER)

        async def follow() -> None:
            async for chunk in job.output(on_break=lambda lost, _: breaks.append(lost.message)):
                assert chunk.offset == sum(seen)
                seen.append(len(chunk.data))

        async with trio.open_nursery() as nursery, trio.open_nursery() as followers:
            followers.start_soon(follow)
            nursery.start_soon(job.wait)
            await until(lambda: bool(seen))
            place("mia-anew")
            revoke(fresh, "mia")
            await reload(fresh)
            await until(lambda: bool(breaks))
            count = len(seen)
            await until(lambda: len(seen) > count)
            assert (await client.hello()).name == "mia-anew"
            await job.stop(grace_seconds=0)
        assert (await job.status()).state is State.STOPPED
        revoke(fresh, "mia-anew")  # and now there are no others
        await reload(fresh)
        with pytest.raises(CertificateRefused, match="revoked"), trio.fail_after(PROMPTLY):
            await until_refused(client)
        issue(fresh, "mia-third", "admin")
        place("mia-third")
        assert (await client.hello()).name == "mia-third"


async def test_client_that_will_not_go_is_cut_off(fresh: EmbeddedService) -> None:
    """It takes nothing that is sent, and answers no closing frame."""
    issue(fresh, "stubborn", "admin")
    host, port = fresh.address.rsplit(":", 1)
    stream = await trio.open_ssl_over_tcp_stream(
        host, int(port), ssl_context=bearing(fresh, "stubborn"), https_compatible=True
    )
    try:
        await stream.send_all(UPGRADE)
        assert (await stream.receive_some(1000)).startswith(b"HTTP/1.1 101")
        revoke(fresh, "stubborn")
        fresh.process.send_signal(signal.SIGHUP)
        await log_tells(fresh, "ended: stubborn")
        address, mine = stream.transport_stream.socket.getsockname()[:2]
        await log_tells(fresh, f"{address}:{mine}: disconnected")
    finally:
        await trio.aclose_forcefully(stream)


def bearing(service: EmbeddedService, name: str) -> ssl.SSLContext:
    """A context with the certificate that was issued to `name`."""
    directory = service.directory / "certs"
    context = bare_context(directory / "ca-cert.pem")
    context.load_cert_chain(directory / f"{name}-cert.pem", directory / f"{name}-key.pem")
    return context


async def test_certificate_that_ends_takes_its_connections_along(fresh: EmbeddedService) -> None:
    directory = fresh.directory / "certs"
    soon = Forger(Authority.load(directory), directory).context(
        valid=(-timedelta(minutes=1), timedelta(seconds=8))
    )
    async with open_socket(fresh, context=soon) as sock:
        with pytest.raises(trio_websocket.ConnectionClosed) as closed, trio.fail_after(60):
            await sock.get_message()
    assert closed.value.reason is not None
    assert (closed.value.reason.code, closed.value.reason.reason) == (
        1008,
        "certificate_refused: your certificate has expired",
    )


async def test_no_session_outlives_a_revocation(fresh: EmbeddedService) -> None:
    """No ticket is handed out by which a client could come back past the list."""
    context = context_for(fresh)
    host, port = fresh.address.rsplit(":", 1)

    def session() -> ssl.SSLSession | None:
        with (
            socket.create_connection((host, int(port)), timeout=PROMPTLY) as plain,
            context.wrap_socket(plain, server_hostname=host) as secured,
        ):
            secured.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert secured.recv(100).startswith(b"HTTP/1.1 426")
            return secured.session

    kept = await trio.to_thread.run_sync(session)
    assert kept is None or not kept.has_ticket


@pytest.mark.parametrize("fault", ["garbage", "missing", "foreign"])
async def test_bad_list_changes_nothing_and_is_told(
    fresh: EmbeddedService, fault: str, tmp_path: Path
) -> None:
    issue(fresh, f"adam-{fault}", "admin")
    revoke(fresh, f"adam-{fault}")
    await reload(fresh)
    crl = fresh.directory / "certs" / "ca-crl.pem"
    good = crl.read_bytes()
    if fault == "garbage":
        crl.write_bytes(good[: len(good) // 2])
    elif fault == "missing":
        crl.unlink()
    else:
        init_authority(tmp_path / "other", [], now=datetime.now(UTC))
        crl.write_bytes((tmp_path / "other" / "ca-crl.pem").read_bytes())
    async with open_wire(fresh, "viewer") as viewer:
        await reload(
            fresh, "ERROR cannot reload, so all stays as it was: cannot use the revocation"
        )
        await viewer.call("service.hello")
        revoked = bearing(fresh, f"adam-{fault}")
        assert isinstance(await dialled(fresh, revoked), CertificateRefused)
        crl.write_bytes(good)
        await reload(fresh)
        await viewer.call("service.hello")


async def test_new_server_certificate_is_shown_and_no_connection_is_dropped(
    fresh: EmbeddedService,
) -> None:
    before = await trio.to_thread.run_sync(_shown, fresh)
    async with open_wire(fresh) as open_before:
        certs(fresh, "renew", "server")
        assert await trio.to_thread.run_sync(_shown, fresh) == before
        await reload(fresh)
        assert await trio.to_thread.run_sync(_shown, fresh) != before
        await open_before.call("service.hello")
        # A key that does not fit: all stays as it was.
        path = fresh.directory / "certs" / "server-key.pem"
        key = path.read_bytes()
        path.write_bytes((fresh.directory / "certs" / "viewer-client-key.pem").read_bytes())
        await reload(fresh, "does not belong to")
        await open_before.call("service.hello")
        assert await trio.to_thread.run_sync(_shown, fresh) != before
        path.write_bytes(key)


def _shown(service: EmbeddedService) -> str:
    host, port = service.address.rsplit(":", 1)
    with (
        socket.create_connection((host, int(port)), timeout=PROMPTLY) as plain,
        context_for(service).wrap_socket(plain, server_hostname=host) as secured,
    ):
        return hashlib.sha256(secured.getpeercert(binary_form=True) or b"").hexdigest()


async def test_roles_change_under_way_and_a_bad_file_changes_nothing(
    fresh: EmbeddedService,
) -> None:
    issue(fresh, "zoe", "visitor")
    context = bearing(fresh, "zoe")
    assert isinstance(await dialled(fresh, context), PermissionDenied)

    visitor = {"roles.visitor": {"operations": ["view"], "scope": "own"}}
    write_configuration(fresh.directory, {**ROLES, **visitor, "worker": {"max_waiting_jobs": 7}})
    await reload(fresh)
    await until(lambda: "worker.max_waiting_jobs has changed" in fresh.log_text())
    assert fresh.log_text().count("has changed; it takes effect") == 1  # not the ids found free
    assert await dialled(fresh, context) is None
    write_configuration(fresh.directory, {**ROLES, **visitor})
    await reload(fresh)
    assert fresh.log_text().count("has changed; it takes effect") == 1  # it is as it was

    (fresh.directory / "worker.toml").write_text("[server]\nport = 'x'\n")
    await reload(fresh, "cannot reload, so all stays as it was: cannot use the configuration")
    assert await dialled(fresh, context) is None

    async with open_socket(fresh) as admin:  # another, who stays
        async with open_socket(fresh, context=context) as zoe:
            write_configuration(fresh.directory, ROLES)
            await reload(fresh)
            with pytest.raises(trio_websocket.ConnectionClosed) as closed:
                await zoe.get_message()
        assert closed.value.reason is not None
        assert closed.value.reason.code == 1008
        assert "'visitor' is not a role" in str(closed.value.reason.reason)
        await admin.send_message('{"jsonrpc":"2.0","id":1,"method":"service.hello"}')
        await admin.get_message()


async def test_role_that_may_do_less_takes_what_it_follows_along(fresh: EmbeddedService) -> None:
    """A subscription was allowed by the role of before, and asks nobody any more."""
    issue(fresh, "ida", "reader")

    def role(*operations: str, scope: str = "all") -> dict[str, dict[str, object]]:
        return ROLES | {"roles.reader": {"operations": operations, "scope": scope}}

    try:
        for less in (role("view"), role("view", "log", scope="own")):
            write_configuration(fresh.directory, role("view", "log"))
            await reload(fresh)
            async with open_wire(fresh) as admin:
                job = await admin.start("sleep", "600")
                async with open_socket(fresh, context=bearing(fresh, "ida")) as sock:
                    follow = {"id": 1, "jsonrpc": "2.0", "method": "job.log", "params": {"id": job}}
                    await sock.send_message(json.dumps(follow))
                    assert "result" in json.loads(await sock.get_message())
                    more = role("view", "log", "stop")
                    write_configuration(fresh.directory, more)
                    await reload(fresh)
                    await sock.ping()  # who may do more stays
                    write_configuration(fresh.directory, less)
                    await reload(fresh)
                    with (
                        trio.fail_after(PROMPTLY),
                        pytest.raises(trio_websocket.ConnectionClosed) as closed,
                    ):
                        await sock.get_message()
                await admin.call("job.stop", id=job, grace_seconds=0)
            assert closed.value.reason is not None
            assert closed.value.reason.code == 1008
            assert "'reader' may do less than before" in str(closed.value.reason.reason)
    finally:
        write_configuration(fresh.directory, ROLES)
        await reload(fresh)
