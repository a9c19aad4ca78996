"""A company's own authority: the page's commands as they stand, and the service upon their files.

Whatever is trusted (the root, the issuing CA alone, both), the handshake and a reload judge alike.
"""

import os
import re
import shutil
import signal
import ssl
import subprocess
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from jobworker.cli.worker.embedded_service import EmbeddedService
from jobworker.client.client import Client
from jobworker.client.opening import open_client
from jobworker.config.settings import load
from jobworker.errors import ConfigError, HostUnsupported, JobworkerError

from ..integration.conftest import _needs_root, open_directory, until
from ..services import open_embedded, write_configuration

__all__ = ["_needs_root", "open_directory"]

PAGE = Path(__file__).parents[2] / "docs" / "pki.md"
MAKE, REVOKE = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
SPIFFE = {"uri:spiffe://example.org/ci": "admin"}


def shell(directory: Path, script: str) -> None:
    subprocess.run(["sh", "-euc", script], cwd=directory, check=True, capture_output=True)


def join(directory: Path, name: str, *pieces: str) -> str:
    """Write a bundle of `pieces`: its path."""
    (directory / name).write_bytes(b"".join((directory / piece).read_bytes() for piece in pieces))
    return str(directory / name)


@pytest.fixture
def pki(open_directory: Callable[[], Path]) -> Path:
    """What the page's commands make, in a directory of a service."""
    directory = open_directory()
    shell(directory, MAKE)
    return directory


def serving(
    directory: Path, *, ca: tuple[str, ...], crl: tuple[str, ...], **security: object
) -> AbstractAsyncContextManager[EmbeddedService]:
    """A service with these CAs and lists."""
    settings: dict[str, Mapping[str, object]] = {
        "security": {
            "ca_cert": join(directory, "trusted.pem", *ca),
            "server_cert": str(directory / "server-cert.pem"),
            "server_key": str(directory / "server-key.pem"),
            "crl": join(directory, "lists.pem", *crl) if crl else "",
            **security,
        }
    }
    return open_embedded(directory, settings)


def connecting(
    service: EmbeddedService, *, trusting: str = "root-cert.pem", own: str = "client-cert.pem"
) -> AbstractAsyncContextManager[Client]:
    """A client of this project's own, with files of the page's."""
    directory = service.directory
    return open_client(
        service.address,
        ca=directory / trusting,
        certificate=directory / own,
        key=directory / "client-key.pem",
        patience_seconds=0,
    )


async def who_am_i(service: EmbeddedService, **files: str) -> tuple[str, str]:
    """Connect: the name and the role that the service tells."""
    async with connecting(service, **files) as client:
        told = await client.hello()
    return told.name, told.role


async def is_refused(service: EmbeddedService, logged: str, **files: str) -> None:
    with trio.fail_after(20), pytest.raises(JobworkerError):
        await who_am_i(service, **files)
    await until(lambda: logged in service.log_text())


async def reload(service: EmbeddedService) -> None:
    """Have all files read again, and wait for it."""
    before = service.log_text().count("reload")
    service.process.send_signal(signal.SIGHUP)
    await until(lambda: service.log_text().count("reload") > before)


TRUSTED = [
    (("root-cert.pem",), ("root-crl.pem", "issuing-crl.pem")),
    (("issuing-cert.pem",), ("issuing-crl.pem",)),
    (("root-cert.pem", "issuing-cert.pem"), ("issuing-crl.pem", "root-crl.pem")),
    (("root-cert.pem",), ()),
    (("issuing-cert.pem",), ()),
]


@pytest.mark.parametrize(("ca", "crl"), TRUSTED)
async def test_whatever_is_trusted_a_reload_judges_like_the_handshake(
    pki: Path, ca: tuple[str, ...], crl: tuple[str, ...]
) -> None:
    async with serving(pki, ca=ca, crl=crl) as service:
        await is_refused(service, "2 OU")
        with_subjects(pki, SPIFFE)
        await reload(service)
        for trusting in ("root-cert.pem", "issuing-cert.pem"):
            assert await who_am_i(service, trusting=trusting) == ("client", "admin")
        async with connecting(service) as client:
            await reload(service)
            await client.hello()
        assert await who_am_i(service) == ("client", "admin")
        if "issuing-cert.pem" in ca:
            assert await who_am_i(service, own="client-alone.pem") == ("client", "admin")
        else:
            await is_refused(service, "unable to get local issuer", own="client-alone.pem")
        if crl:
            shell(pki, REVOKE)
            join(pki, "lists.pem", *crl)
            await reload(service)
            await is_refused(service, "certificate revoked")


async def open_then_reload(service: EmbeddedService, change: Callable[[], object]) -> str:
    """Connect, change something, reload: why the service ended the connection, by its log."""
    async with connecting(service):
        change()
        await reload(service)
        await until(lambda: ": ended: client" in service.log_text())
    return next(line for line in service.log_text().splitlines() if ": ended: client" in line)


def with_subjects(directory: Path, subjects: Mapping[str, str]) -> None:
    """Write the table of subjects into the configuration, in the place of an earlier one."""
    path = directory / "worker.toml"
    lines = [f'"{entry}" = "{role}"' for entry, role in subjects.items()]
    text = path.read_text().partition("# table\n")[0]
    path.write_text("\n".join([text + "# table", "[security.subjects]", *lines, ""]))


@pytest.mark.parametrize("ca", [("root-cert.pem",), ("issuing-cert.pem", "root-cert.pem")])
async def test_client_of_a_revoked_issuing_authority_is_out_at_once(
    pki: Path, ca: tuple[str, ...]
) -> None:
    crl = ("root-crl.pem", "issuing-crl.pem")

    def revoke_issuing() -> None:
        shell(
            pki,
            "export CA=root\nopenssl ca -config extensions.cnf -revoke issuing-cert.pem "
            "-cert root-cert.pem -keyfile root-key.pem\n"
            "openssl ca -config extensions.cnf -gencrl -cert root-cert.pem -keyfile root-key.pem "
            "-out root-crl.pem",
        )
        join(pki, "lists.pem", *crl)

    async with serving(pki, ca=ca, crl=crl) as service:
        with_subjects(pki, SPIFFE)
        await reload(service)
        why = await open_then_reload(service, revoke_issuing)
        assert "revoked" in why
        await is_refused(service, "certificate revoked")


async def test_chain_with_a_certificate_that_nobody_needs_or_can_read_holds_up_no_reload(
    pki: Path,
) -> None:
    """A client can send any certificate behind its own, and OpenSSL ignores it."""
    root = ssl.PEM_cert_to_DER_cert((pki / "root-cert.pem").read_text())
    version_2 = root.replace(bytes.fromhex("a003020102"), bytes.fromhex("a003020101"), 1)
    odd = (pki / "client-cert.pem").read_text() + ssl.DER_cert_to_PEM_cert(version_2)
    (pki / "odd.pem").write_text(odd)
    crl = ("root-crl.pem", "issuing-crl.pem")
    async with serving(pki, ca=("root-cert.pem",), crl=crl) as service:
        with_subjects(pki, SPIFFE)
        await reload(service)
        async with AsyncExitStack() as stack:
            for own in ("client-cert.pem", "odd.pem", "client-cert.pem"):
                await stack.enter_async_context(connecting(service, own=own))
            await reload(service)
            assert ": ended: client" not in service.log_text()
            shell(pki, REVOKE)
            join(pki, "lists.pem", *crl)
            await reload(service)
            await until(lambda: service.log_text().count("it has been revoked") == 3)
        assert "incident" not in service.log_text()


async def test_other_authority_of_the_same_root_is_a_stranger_or_needs_a_list(pki: Path) -> None:
    shell(
        pki,
        MAKE.partition("# the server and a client")[0].partition("# the root")[0]
        + (
            'openssl req $key -keyout other-key.pem -out other.csr -subj "/O=Example/CN=Other CA"\n'
            "openssl x509 -req -in other.csr -CA root-cert.pem -CAkey root-key.pem "
            "-out other-cert.pem -days 90 -extfile extensions.cnf -extensions issuing\n"
            "openssl x509 -req -in client.csr -CA other-cert.pem -CAkey other-key.pem -out c.pem "
            "-days 90 -extfile extensions.cnf -extensions client\n"
            "cat c.pem other-cert.pem > other-client.pem\n"
        ),
    )
    for ca, crl, logged in (
        (("issuing-cert.pem",), (), "unable to get"),
        (("root-cert.pem",), ("root-crl.pem", "issuing-crl.pem"), "unable to get certificate CRL"),
    ):
        async with serving(pki, ca=ca, crl=crl) as service:
            with_subjects(pki, SPIFFE)
            await reload(service)
            await is_refused(service, logged, own="other-client.pem")
            assert (await who_am_i(service))[1] == "admin"


async def test_certificate_that_is_no_authority_is_not_trusted(pki: Path) -> None:
    with pytest.raises(HostUnsupported, match=r"CN=client.*is not a CA"):
        async with serving(pki, ca=("root-cert.pem", "client-alone.pem"), crl=()):
            pass


def list_of_issuing(pki: Path, extension: x509.ExtensionType) -> bytes:
    """An empty list of the issuing CA, newer than its other ones, with a critical extension."""
    key = serialization.load_pem_private_key((pki / "issuing-key.pem").read_bytes(), None)
    issuing = x509.load_pem_x509_certificate((pki / "issuing-cert.pem").read_bytes())
    now = datetime.now(UTC)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuing.subject)
        .last_update(now)
        .next_update(now + timedelta(days=1))
        .add_extension(extension, critical=True)
    )
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    made = builder.sign(key, hashes.SHA256())
    return made.public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize("before", [True, False])
async def test_delta_list_brings_no_revoked_client_back(pki: Path, *, before: bool) -> None:
    """OpenSSL 3.0 took it for the complete list, in which nobody is revoked."""
    async with serving(pki, ca=("issuing-cert.pem",), crl=("issuing-crl.pem",)) as service:
        with_subjects(pki, SPIFFE)
        shell(pki, REVOKE)
        join(pki, "lists.pem", "issuing-crl.pem")
        await reload(service)
        await is_refused(service, "certificate revoked")
        delta = list_of_issuing(pki, x509.DeltaCRLIndicator(1))
        complete = (pki / "issuing-crl.pem").read_bytes()
        (pki / "lists.pem").write_bytes(delta + complete if before else complete + delta)
        await reload(service)
        assert "lists.pem: it is a delta list" in service.log_text()
        refusals = service.log_text().count("certificate revoked")
        with pytest.raises(JobworkerError):
            await who_am_i(service)
        await until(lambda: service.log_text().count("certificate revoked") > refusals)


async def test_list_of_a_distribution_point_is_for_the_certificates_that_name_it(pki: Path) -> None:
    """In the handshake and at a reload alike."""
    uri = "http://crl.example.org/1.crl"
    with (pki / "extensions.cnf").open("a") as extensions:
        extensions.write("[point]\n")
        extensions.write(
            (pki / "extensions.cnf").read_text().partition("[client]\n")[2].partition("[ca]")[0]
        )
        extensions.write(f"crlDistributionPoints = URI:{uri}\n")
    shell(
        pki,
        "export CA=issuing\n"
        "openssl x509 -req -in client.csr -CA issuing-cert.pem -CAkey issuing-key.pem "
        "-out point.pem -days 90 -extfile extensions.cnf -extensions point\n",
    )
    async with serving(pki, ca=("issuing-cert.pem",), crl=("issuing-crl.pem",)) as service:
        with_subjects(pki, SPIFFE)
        await reload(service)
        async with connecting(service), connecting(service, own="point.pem") as named:
            scope = x509.IssuingDistributionPoint(
                [x509.UniformResourceIdentifier(uri)], None, False, False, None, False, False
            )
            (pki / "lists.pem").write_bytes(list_of_issuing(pki, scope))
            await reload(service)
            await until(lambda: service.log_text().count(": ended: client") == 1)
            await named.hello()
            warning = f"only for certificates that name the distribution point {uri}"
            await until(lambda: warning in service.log_text())
        assert (await who_am_i(service, own="point.pem"))[1] == "admin"
        await is_refused(service, "different CRL scope")


async def test_missing_list_is_named_at_the_start(pki: Path) -> None:
    with pytest.raises(HostUnsupported, match=r"no list of the CA CN=Example Root"):
        async with serving(pki, ca=("root-cert.pem",), crl=("issuing-crl.pem",)):
            pass


@pytest.mark.parametrize(
    ("subjects", "role"),
    [
        ({"uri:spiffe://example.org/ci": "viewer"}, "viewer"),
        ({"cn:client": "viewer"}, "viewer"),
        ({"ou:Linux": "viewer"}, "viewer"),
        ({"ou:Linux": "viewer", "cn:client": "viewer", "cn:other": "admin"}, "viewer"),
        ({"ou:Linux": "viewer", "ou:Builds": "admin"}, "table gives it admin and viewer"),
        ({"ou:linux": "viewer"}, "2 OU"),
        ({"uri:spiffe://example.org/": "admin"}, "2 OU"),
        ({"dns:client": "admin"}, "2 OU"),
    ],
)
async def test_role_is_what_the_table_says_of_exactly_what_is_borne(
    pki: Path, subjects: dict[str, str], role: str
) -> None:
    async with serving(pki, ca=("root-cert.pem",), crl=()) as service:
        with_subjects(pki, subjects)
        await reload(service)
        if role == "viewer":
            assert await who_am_i(service) == ("client", role)
        else:
            await is_refused(service, role)


@pytest.mark.parametrize("kind", ["dns", "email"])
async def test_alternative_name_in_the_table_gives_a_role_and_a_name(pki: Path, kind: str) -> None:
    """Where the certificate has no CN, as with those that are made for hosts."""
    bears = {"dns": "build1.example.org", "email": "alice@example.org"}
    extensions = (
        (pki / "extensions.cnf")
        .read_text()
        .replace(
            "URI:spiffe://example.org/ci",
            ",".join(f"{each}:{name}" for each, name in bears.items()),
        )
    )
    (pki / "extensions.cnf").write_text(extensions.replace("dns:", "DNS:"))
    shell(
        pki,
        "export CA=root\n"
        "openssl req -new -key client-key.pem -out c.csr -config extensions.cnf -subj /O=Example\n"
        "openssl x509 -req -in c.csr -CA root-cert.pem -CAkey root-key.pem -out nameless.pem "
        "-days 90 -extfile extensions.cnf -extensions client\n",
    )
    async with serving(pki, ca=("root-cert.pem",), crl=()) as service:
        await is_refused(service, "no OU", own="nameless.pem")
        with_subjects(pki, {f"{kind}:{bears[kind]}": "viewer", "dns:other.example.org": "admin"})
        await reload(service)
        assert await who_am_i(service, own="nameless.pem") == (bears[kind], "viewer")


async def test_whom_the_table_gives_another_role_has_to_connect_again(pki: Path) -> None:
    async with serving(pki, ca=("root-cert.pem",), crl=()) as service:
        with_subjects(pki, {"cn:client": "admin"})
        await reload(service)
        demote = lambda: with_subjects(pki, {"cn:client": "viewer"})  # noqa: E731
        assert "role viewer now" in await open_then_reload(service, demote)
        assert await who_am_i(service) == ("client", "viewer")


async def test_table_alone_decides_where_it_shall(open_directory: Callable[[], Path]) -> None:
    """By the certificates of our own authority, whose OU is a role."""
    directory = open_directory()
    security = {"security": {"roles_from_ou": False}}
    async with open_embedded(directory, security) as service:
        own = service.environment("admin")
        shutil.copy(own["WORKER_KEY_PATH"], directory / "client-key.pem")
        files = {"trusting": own["WORKER_CA_PATH"], "own": own["WORKER_CERT_PATH"]}
        await is_refused(service, "table does not name it", **files)
        with_subjects(directory, {"ou:admin": "viewer"})
        await reload(service)
        assert (await who_am_i(service, **files))[1] == "viewer"


def test_faults_of_the_table_are_named_all_at_once(tmp_path: Path) -> None:
    config = write_configuration(tmp_path, {})
    with_subjects(tmp_path, {"cn:alice": "boss", "dns:a": "viewer"})
    with pytest.raises(ConfigError, match=r"'cn:alice' has the role 'boss'.*admin, viewer"):
        load(config)
    with_subjects(tmp_path, {"*": "admin", "cn:": "admin", "CN:x": "admin"})
    with pytest.raises(ConfigError) as caught:
        load(config)
    for entry in ("'*'", "'cn:'", "'CN:x'"):
        assert entry in caught.value.message
    assert os.fspath(config) in caught.value.message
