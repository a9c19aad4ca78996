"""`worker certs` and the programs that use what it makes, from the real command line."""

import json
import os
import re
import ssl
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, pkcs12

from jobworker.cli.worker.embedded_service import EmbeddedService, program
from jobworker.pki.refusals import client_refusal

Done = subprocess.CompletedProcess[str]
PASSPHRASE = "correct horse battery"


def certs(*arguments: str, **environment: str) -> Done:
    return subprocess.run(
        [*program("worker"), "certs", *arguments],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
        check=False,
    )


def fails(done: Done, code: int, words: str) -> None:
    assert done.returncode == code, done.stderr
    *usage, line = done.stderr.splitlines()
    assert not usage or code == 2
    assert words in line


def listed(directory: Path) -> list[dict[str, object]]:
    found = json.loads(certs("list", f"--dir={directory}", "--json").stdout)
    assert isinstance(found, list)
    return found


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    directory = tmp_path / "certs"
    assert certs("init", f"--dir={directory}", "--host=a.example").returncode == 0
    return directory


def test_issued_certificate_is_in_the_index_and_its_files_are_closed(authority: Path) -> None:
    at = f"--dir={authority}"
    done = certs("issue", at, "--name=alice", "--role=tenant", "--days=7")
    assert done.returncode == 0, done.stderr
    assert "[roles.tenant]" in done.stdout
    assert stat.S_IMODE((authority / "alice-key.pem").stat().st_mode) == 0o600
    assert stat.S_IMODE((authority / "issued.json").stat().st_mode) == 0o600
    entry = listed(authority)[-1]
    assert (entry["name"], entry["role"], entry["revoked_at"]) == ("alice", "tenant", None)
    shown = certs("show", "alice", at).stdout
    assert f"Serial: {entry['serial']}" in shown
    assert certs("show", str(authority / "alice-cert.pem"), at).stdout == shown
    assert re.search(r"alice +tenant +valid ", certs("list", at).stdout)
    serial = subprocess.run(
        ["openssl", "x509", "-noout", "-serial", "-in", authority / "alice-cert.pem"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert serial == f"serial={entry['serial']}\n"


def test_name_is_not_given_twice_by_mistake(authority: Path) -> None:
    at = f"--dir={authority}"
    assert certs("issue", at, "--name=alice", "--role=admin").returncode == 0
    fails(certs("issue", at, "--name=alice", "--role=viewer"), 65, "--again")
    fails(
        certs("issue", at, "--name=Alice", "--role=viewer", "--again"), 65, "it looks like 'alice'"
    )
    fails(certs("issue", at, "--name=ａlice", "--role=viewer"), 65, "looks like")  # noqa: RUF001
    again = certs("issue", at, "--name=alice", "--role=viewer", "--again", f"--out={authority}/2")
    assert again.returncode == 0, again.stderr
    assert [each["role"] for each in listed(authority)[-2:]] == ["admin", "viewer"]
    assert len(certs("revoke", "alice", at).stdout.split("Revoked ")) == 3  # both of the name
    assert certs("issue", at, "--name=Alice", "--role=viewer").returncode == 0  # it is free


@pytest.mark.parametrize("role", ["Admin", "аdmin", "admin ", "a b", ""])  # noqa: RUF001
def test_role_that_could_be_taken_for_another_is_refused(authority: Path, role: str) -> None:
    done = certs("issue", f"--dir={authority}", "--name=x", f"--role={role}")
    assert done.returncode in (2, 65)
    assert len(listed(authority)) == 3
    assert not list(authority.glob("x-*"))


def test_failed_issue_leaves_neither_file_nor_entry(authority: Path) -> None:
    (authority / "bob-cert.pem").write_text("mine")
    fails(certs("issue", f"--dir={authority}", "--name=bob", "--role=viewer"), 72, "exists already")
    assert (authority / "bob-cert.pem").read_text() == "mine"
    assert not (authority / "bob-key.pem").exists()
    assert len(listed(authority)) == 3


def test_renewed_certificate_takes_the_place_of_the_old_one(authority: Path) -> None:
    at, before = f"--dir={authority}", (authority / "server-cert.pem").read_bytes()
    key = (authority / "server-key.pem").read_bytes()
    assert certs("renew", "server", at).returncode == 0
    made = x509.load_pem_x509_certificate((authority / "server-cert.pem").read_bytes())
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "a.example" in names.get_values_for_type(x509.DNSName)
    assert before != (authority / "server-cert.pem").read_bytes()
    assert key != (authority / "server-key.pem").read_bytes()
    assert stat.S_IMODE((authority / "server-key.pem").stat().st_mode) == 0o600
    assert [each["name"] for each in listed(authority)].count("server") == 2
    fails(certs("renew", "nobody", at), 66, "'nobody': none of that name or serial was issued")
    assert "file" not in certs("renew", "nobody", at).stderr
    for command in ("revoke", "show"):
        fails(certs(command, "nobody", at), 66, "certs list, or name the certificate's file")


def revoked_serials(directory: Path) -> set[str]:
    crl = x509.load_pem_x509_crl((directory / "ca-crl.pem").read_bytes())
    return {f"{each.serial_number:X}" for each in crl}


def test_revocation_is_for_good_even_if_the_index_is_lost(authority: Path) -> None:
    at = f"--dir={authority}"
    assert revoked_serials(authority) == set()
    done = certs("revoke", str(authority / "viewer-client-cert.pem"), at, "--reason=superseded")
    assert done.returncode == 0, done.stderr
    first = revoked_serials(authority)
    assert len(first) == 1
    fails(certs("renew", "viewer-client", at), 65, "was revoked")
    (authority / "issued.json").unlink()
    assert certs("issue", at, "--name=eve", "--role=viewer").returncode == 0
    certs("revoke", "eve", at)
    assert revoked_serials(authority) > first
    fails(certs("revoke", "eve", at, "--reason=whim"), 2, "keyCompromise")


def test_certificate_that_the_index_has_lost_is_revoked_by_its_file(
    authority: Path, tmp_path: Path
) -> None:
    at, file = f"--dir={authority}", str(authority / "viewer-client-cert.pem")
    (authority / "issued.json").write_text("{")
    fails(certs("revoke", file, at), 72, "only its file can revoke one")
    (authority / "issued.json").unlink()
    done = certs("revoke", file, at)
    assert done.returncode == 0, done.stderr
    assert [each["name"] for each in listed(authority)] == ["viewer-client"]
    assert revoked_serials(authority) == {str(listed(authority)[0]["serial"]).lstrip("0")}
    certs("init", f"--dir={tmp_path}/other")
    foreign = f"{tmp_path}/other/viewer-client-cert.pem"
    fails(certs("revoke", foreign, at), 65, "this CA has not signed it")
    fails(certs("revoke", str(authority / "ca-cert.pem"), at), 65, "it is the CA's own")
    assert "\nKind: CA\n" in certs("show", str(authority / "ca-cert.pem"), at).stdout


def test_server_gets_another_host_by_the_command_that_its_client_is_told(authority: Path) -> None:
    refused = ssl.SSLCertVerificationError()
    refused.verify_code, refused.verify_message = 62, "certificate is not valid for 'b.example'"
    told = re.search(r"worker (certs .*DIR)", client_refusal(refused).remedy)
    assert told is not None
    words = told[1].replace("NAME", "b.example").replace("DIR", str(authority)).split()[1:]
    done = certs(*words)
    assert done.returncode == 0, done.stderr
    made = x509.load_pem_x509_certificate((authority / "server-cert.pem").read_bytes())
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "a.example", "b.example"]
    fails(certs("renew", "admin-client", f"--dir={authority}", "--host=x"), 65, "not a server's")


def test_list_is_made_where_there_is_none_and_forgets_nothing(authority: Path) -> None:
    at = f"--dir={authority}"
    (authority / "ca-crl.pem").unlink()
    assert certs("crl", at).returncode == 0
    assert revoked_serials(authority) == set()
    certs("revoke", "viewer-client", at)
    revoked = revoked_serials(authority)
    assert certs("crl", at).returncode == 0
    assert revoked_serials(authority) == revoked != set()


def test_encrypted_ca_key_needs_its_passphrase(tmp_path: Path) -> None:
    directory, file = tmp_path / "certs", tmp_path / "passphrase"
    file.write_text(f"{PASSPHRASE}\n")
    at = f"--dir={directory}"
    fails(certs("init", at, "--encrypt-key"), 72, "WORKER_CA_PASSPHRASE")
    fails(certs("init", at, "--encrypt-key", WORKER_CA_PASSPHRASE="short"), 72, "8 characters")
    endless = ("init", at, "--encrypt-key", "--passphrase-file=/dev/zero")
    fails(certs(*endless), 72, "its first line is longer than 4096 bytes")
    assert certs("init", at, "--encrypt-key", f"--passphrase-file={file}").returncode == 0
    assert b"ENCRYPTED" in (directory / "ca-key.pem").read_bytes()
    issue = ("issue", at, "--name=alice", "--role=viewer")
    fails(certs(*issue), 72, "standard input is not a terminal")
    fails(certs(*issue, WORKER_CA_PASSPHRASE="wrong passphrase"), 72, "passphrase is wrong")
    assert certs(*issue, WORKER_CA_PASSPHRASE=PASSPHRASE).returncode == 0
    assert certs("revoke", "alice", at, f"--passphrase-file={file}").returncode == 0


def test_bundle_for_a_browser(authority: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "alice.p12"
    arguments = ("issue", f"--dir={authority}", "--name=alice", "--role=viewer")
    done = certs(*arguments, f"--pkcs12={bundle}")
    assert done.returncode == 0, done.stderr
    password = done.stdout.split("password is ")[1].strip()
    assert stat.S_IMODE(bundle.stat().st_mode) == 0o600
    key, certificate, others = pkcs12.load_key_and_certificates(
        bundle.read_bytes(), password.encode()
    )
    assert key is not None
    assert certificate is not None
    assert certificate.public_bytes(Encoding.PEM) == (authority / "alice-cert.pem").read_bytes()
    assert others[0].public_bytes(Encoding.PEM) == (authority / "ca-cert.pem").read_bytes()


def cli(service: EmbeddedService, role: str, *arguments: str) -> Done:
    return subprocess.run(
        [*program("worker-cli"), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **service.environment(role)},
        check=False,
    )


def test_whoami_and_ping(tenants: EmbeddedService) -> None:
    done = cli(tenants, "alice", "whoami")
    assert done.returncode == 0, done.stderr
    assert "Name: alice\nRole: tenant\n" in done.stdout
    told = json.loads(cli(tenants, "viewer", "--json", "whoami").stdout)
    assert (told["name"], told["role"]) == ("viewer-client", "viewer")
    done = cli(tenants, "viewer", "ping", "-c", "2")
    assert re.fullmatch(
        r"connected to .* in [\d.]+ ms\nanswer 1 in [\d.]+ ms\nanswer 2 in [\d.]+ ms\n", done.stdout
    )


def test_quota_is_told_in_one_line(tenants: EmbeddedService) -> None:
    done = cli(tenants, "quinn", "run", "--max-memory=100", "--max-output=1", "true")
    fails(done, 75, "your quota is 64 MiB")
