"""Read passphrases for keys from a file, a variable or a prompt, never from the command line.

Every user of the host can see a program's arguments.
"""

import os
import secrets
import sys
from pathlib import Path

import asyncclick as click

from jobworker.errors import CredentialsUnusable

CA_VARIABLE = "WORKER_CA_PASSPHRASE"
PKCS12_VARIABLE = "WORKER_PKCS12_PASSWORD"
LEAST = 8
"""Characters of a new passphrase, at least."""
PASSPHRASE_BYTES_MAX = 4096


def ca_passphrase(file: Path | None) -> bytes:
    """Return the passphrase of an existing CA key. Raises CredentialsUnusable."""
    return _from_file_or_variable(file) or _from_prompt("Passphrase of the CA's key", confirm=False)


def new_passphrase(file: Path | None) -> bytes:
    """Return a passphrase to encrypt a new CA key with. Raises CredentialsUnusable."""
    made = _from_file_or_variable(file) or _from_prompt(
        "New passphrase for the CA's key", confirm=True
    )
    if len(made) < LEAST:
        raise CredentialsUnusable(
            f"cannot encrypt the key: the passphrase has fewer than {LEAST} characters",
            remedy="choose a longer one",
        )
    return made


def pkcs12_password() -> tuple[str, bool]:
    """Return the password of a PKCS #12 bundle, and whether it was generated here."""
    given = os.environ.get(PKCS12_VARIABLE, "")
    return (given, False) if given else (secrets.token_urlsafe(12), True)


def _from_file_or_variable(file: Path | None) -> bytes:
    if file is None:
        return os.environ.get(CA_VARIABLE, "").encode()
    try:
        with file.open("rb") as opened:  # a pipe is welcome
            line = opened.readline(PASSPHRASE_BYTES_MAX + 1)
    except OSError as error:
        raise CredentialsUnusable(
            f"cannot read the passphrase {file}: {os.strerror(error.errno or 0)}",
            remedy="name a file that this user may read",
        ) from None
    if len(line) > PASSPHRASE_BYTES_MAX:
        raise CredentialsUnusable(
            f"cannot use the passphrase {file}: its first line is longer than "
            f"{PASSPHRASE_BYTES_MAX} bytes",
            remedy="write the passphrase into its first line",
        )
    first = line.splitlines()
    if not first or not first[0]:
        raise CredentialsUnusable(
            f"cannot use the passphrase {file}: its first line is empty",
            remedy="write the passphrase into its first line",
        )
    return first[0]


def _from_prompt(words: str, *, confirm: bool) -> bytes:
    if not sys.stdin.isatty():
        raise CredentialsUnusable(
            "cannot use the CA's key: it needs a passphrase, and standard input is not a terminal",
            remedy=f"give --passphrase-file or set {CA_VARIABLE}",
        )
    import getpass

    made = getpass.getpass(f"{words}: ")
    if confirm and made != getpass.getpass("Again: "):
        raise click.UsageError("the two passphrases differ")
    return made.encode()
