"""`worker certs`: make and manage the certificates of an authority, on the host that has its key.

No command needs the service. The service reads a changed revocation list or a renewed certificate
at its next start or SIGHUP; the commands that change these files print that.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import asyncclick as click

from jobworker.cli.command_line.failures import print_text
from jobworker.cli.worker import render_certs
from jobworker.cli.worker.passphrases import ca_passphrase, new_passphrase, pkcs12_password

if TYPE_CHECKING:
    from jobworker.pki.administration import IssuedFiles
    from jobworker.pki.authority import Authority

DEFAULT_DIRECTORY = Path("/etc/jobworker/certs")
RELOAD = "Have the service read it: systemctl reload worker, or kill -HUP PID."

_directory = click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path),
    default=DEFAULT_DIRECTORY,
    show_default=True,
    help="The authority's directory, made by `worker certs init`.",
)
_passphrase_file = click.option(
    "--passphrase-file",
    type=click.Path(path_type=Path),
    help="File with the passphrase of the CA's key [default: WORKER_CA_PASSPHRASE, or a prompt].",
)
_days = click.option(
    "--days", type=int, default=365, show_default=True, help="Days for which it is valid."
)
_out = click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Directory for the two files [default: --dir].",
)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
_hosts = click.option(
    "--host",
    "hosts",
    multiple=True,
    metavar="NAME|IP",
    help="A name or address by which clients reach the server; may be repeated. "
    "localhost, 127.0.0.1 and ::1 are always included.",
)


@click.group()
def certs() -> None:
    """Make and manage certificates."""


def _authority(directory: Path, passphrase_file: Path | None) -> "Authority":
    from jobworker.pki.authority import Authority

    return Authority.load(directory, lambda: ca_passphrase(passphrase_file))


def _now() -> datetime:
    return datetime.now(UTC)


@certs.command("init")
@click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path),
    required=True,
    help="Directory to write to; created if it is missing.",
)
@_hosts
@_days
@click.option(
    "--ca-days", type=int, default=3650, show_default=True, help="Days for which the CA is valid."
)
@click.option("--encrypt-key", is_flag=True, help="Encrypt the CA's key with a passphrase.")
@_passphrase_file
def init(
    directory: Path,
    hosts: tuple[str, ...],
    days: int,
    ca_days: int,
    encrypt_key: bool,
    passphrase_file: Path | None,
) -> None:
    """Make a CA, a server certificate, and client certificates for an admin and a viewer."""
    from jobworker.pki.administration import init_authority

    passphrase = new_passphrase(passphrase_file) if encrypt_key else None
    made = init_authority(
        directory, hosts, now=_now(), days=days, ca_days=ca_days, passphrase=passphrase
    )
    print_text(f"Certificates for {', '.join(made.hosts)}")
    for path in made.files:
        print_text(f"  {path}")
    print_text(f"They are valid until {made.not_after:%Y-%m-%d}. Keep ca-key.pem off the server.")


@certs.command("issue")
@_directory
@click.option("--name", help="Name of the client, a person or a program. One name is one tenant.")
@click.option("--role", help="Role of the client: admin, viewer, or a role of the configuration.")
@click.option("--server", is_flag=True, help="Issue a server's certificate instead, for --host.")
@_hosts
@_days
@_out
@click.option(
    "--pkcs12",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Also write certificate and key for a browser. The password comes from "
    "WORKER_PKCS12_PASSWORD; without it, one is generated and printed.",
)
@click.option(
    "--again", is_flag=True, help="Issue it even if the name has one; both are the same tenant."
)
@_passphrase_file
def issue(  # noqa: PLR0913
    *,
    directory: Path,
    name: str | None,
    role: str | None,
    server: bool,
    hosts: tuple[str, ...],
    days: int,
    out: Path | None,
    pkcs12: Path | None,
    again: bool,
    passphrase_file: Path | None,
) -> None:
    """Issue a certificate to a client (--name, --role) or to a server (--server, --host)."""
    from jobworker.pki import administration

    if server == bool(name or role) or (not server and not (name and role)):
        raise click.UsageError("give --name and --role, or --server")
    if server and (pkcs12 or again):
        raise click.UsageError("--pkcs12 and --again are for clients' certificates")
    if not server and hosts:
        raise click.UsageError("--host is for a server's certificate")
    _check_role(role)
    authority = _authority(directory, passphrase_file)
    if server:
        wanted = [*administration.ALWAYS_HOSTS, *hosts]
        made = administration.issue_server(
            directory, authority, wanted, now=_now(), days=days, out=out
        )
    else:
        made = administration.issue_client(
            directory,
            authority,
            name=name or "",
            role=role or "",
            now=_now(),
            days=days,
            out=out,
            again=again,
        )
    _print_issued(made)
    if pkcs12 is not None:
        _write_pkcs12(pkcs12, made, authority)


def _check_role(role: str | None) -> None:
    from jobworker.errors import InvalidParams
    from jobworker.model.access import BUILT_IN, role_name_fault

    if role is None or any(role == built_in.name for built_in in BUILT_IN):
        return
    if fault := role_name_fault(role):
        raise InvalidParams(f"cannot issue a certificate: the role {fault}")
    print_text(f"Note: the service must know the role: [roles.{role}] in its configuration.")


def _write_pkcs12(path: Path, made: "IssuedFiles", authority: "Authority") -> None:
    from jobworker.pki.files import KEY_MODE, write_new

    password, fresh = pkcs12_password()
    bundle = made.issued.pkcs12(made.entry.name, authority.root.certificate, password.encode())
    write_new(path.parent, {path.name: (bundle, KEY_MODE)})
    print_text(f"  {path}")
    if fresh:
        print_text(f"Its password is {password}")


def _print_issued(made: "IssuedFiles") -> None:
    print_text(render_certs.issued(made.entry))
    for path in made.files:
        print_text(f"  {path}")


@certs.command("renew")
@click.argument("which", metavar="NAME|SERIAL")
@_directory
@click.option(
    "--host",
    "hosts",
    multiple=True,
    metavar="NAME|IP",
    help="A name or address to add to those in a server's certificate; may be repeated.",
)
@_days
@_out
@_passphrase_file
def renew(
    *,
    which: str,
    directory: Path,
    hosts: tuple[str, ...],
    days: int,
    out: Path | None,
    passphrase_file: Path | None,
) -> None:
    """Issue a successor, with a new key, and replace the files of NAME (or "server") or SERIAL.

    The old certificate stays valid until it expires or is revoked by its serial.
    """
    from jobworker.pki.administration import renew as renew_certificate

    authority = _authority(directory, passphrase_file)
    made = renew_certificate(
        directory, authority, which, now=_now(), days=days, hosts=hosts, out=out
    )
    _print_issued(made)
    if made.entry.kind == "server":
        print_text(RELOAD)


@certs.command("revoke")
@click.argument("which", metavar="NAME|SERIAL|FILE")
@_directory
@click.option("--reason", default="", help="Why: keyCompromise, superseded, … (RFC 5280, 5.3.1).")
@_passphrase_file
def revoke(which: str, directory: Path, reason: str, passphrase_file: Path | None) -> None:
    """Revoke a certificate by serial or file, or all of a name; rewrite the revocation list."""
    from jobworker.pki import registry
    from jobworker.pki.administration import revoke as revoke_certificates

    if reason and reason not in registry.REASONS:
        raise click.UsageError(f"--reason is one of {', '.join(registry.REASONS)}")
    authority = _authority(directory, passphrase_file)
    wanted = Path(which) if _is_file(which) else which
    revoked = revoke_certificates(directory, authority, wanted, now=_now(), reason=reason)
    for entry in revoked:
        print_text(render_certs.revoked(entry))
    if not revoked:
        print_text("It was revoked before; the revocation list has been rewritten.")
    print_text(f"  {directory / registry.LIST}")
    print_text(RELOAD)


@certs.command("crl")
@_directory
@_passphrase_file
def crl(directory: Path, passphrase_file: Path | None) -> None:
    """Rewrite the revocation list, also for an authority that has none yet."""
    from jobworker.pki.administration import write_list

    print_text(f"  {write_list(directory, _authority(directory, passphrase_file), now=_now())}")
    print_text(RELOAD)


def _is_file(which: str) -> bool:
    """Whether `which` names a file, not a client or a serial."""
    return "/" in which or which.endswith(".pem")


@certs.command("list")
@_directory
@_json
def list_certificates(directory: Path, as_json: bool) -> None:
    """List all issued certificates: name, role, state, end of validity, serial."""
    from jobworker.pki.registry import locked, read_registry

    with locked(directory):
        entries = read_registry(directory).certificates
    print_text(render_certs.as_json(entries) if as_json else render_certs.table(entries, _now()))


@certs.command("show")
@click.argument("which", metavar="FILE|NAME|SERIAL")
@_directory
@_json
def show(which: str, directory: Path, as_json: bool) -> None:
    """Show one certificate: a PEM file, or one that this authority has issued."""
    from jobworker.pki.certificate_files import read_certificate
    from jobworker.pki.registry import read_registry

    if _is_file(which):
        _, entry = read_certificate(Path(which))
        known = [e for e in read_registry(directory).certificates if e.serial == entry.serial]
        entry = known[0] if known and known[0].fingerprint == entry.fingerprint else entry
    else:
        entry = read_registry(directory).find(which, or_file=True)
    print_text(render_certs.as_json([entry]) if as_json else render_certs.details(entry, _now()))
