"""`worker-cli`: the client's command line, from global options to exit code.

Every failure is one line on standard error (with --json, one JSON object) and an exit code: 2 for a
usage error, and for the rest that of its class in `errors`.
"""

import logging
import sys

import asyncclick as click

import jobworker
from jobworker.cli.command_line.failures import (
    describe_misuse,
    end_of_printing,
    leaves,
    print_note,
    run_program,
)
from jobworker.cli.worker_cli import jobs, list_jobs, output, run, session, volumes
from jobworker.cli.worker_cli.connection_options import (
    CA,
    CERTIFICATE,
    KEY,
    SERVER,
    Invocation,
    json_option,
    pass_invocation,
)
from jobworker.cli.worker_cli.console import PROGRAM, LogPrinter, print_error
from jobworker.errors import JobworkerError
from jobworker.serialization.json_text import dumps


class _Program(click.Group):
    """The group of commands; prints the error of one that fails."""

    async def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: object,
    ) -> click.Context:
        """See click.Command. With --json, prints a usage error of a global option as JSON."""
        try:
            return await super().make_context(info_name, args, parent, **extra)
        except click.UsageError as misuse:
            _exit_with_json(misuse)
            raise

    async def invoke(self, ctx: click.Context) -> object:
        """See click.Command. Prints a failure, as JSON with --json, and exits with its code."""
        try:
            return await super().invoke(ctx)
        except click.UsageError as misuse:
            _exit_with_json(misuse)
            raise
        except JobworkerError as error:
            print_error(error, json=ctx.ensure_object(Invocation).json)
            raise click.exceptions.Exit(error.exit_code) from None
        except (OSError, BaseExceptionGroup) as raised:
            faults = list(leaves(raised))
            first = faults[0]
            if not isinstance(first, OSError) or any(not isinstance(f, OSError) for f in faults):
                raise
            # Every other OSError has been mapped to a JobworkerError: this one is from printing.
            code, failed = end_of_printing(first)
            if failed is not None:
                print_error(failed, json=ctx.ensure_object(Invocation).json)
            raise click.exceptions.Exit(code) from None


def _exit_with_json(misuse: click.UsageError) -> None:
    """With --json, print a usage error as JSON and exit; without it, return."""
    invocation = misuse.ctx.find_object(Invocation) if misuse.ctx else None
    if invocation is not None and invocation.json:
        message, remedy = describe_misuse(misuse, PROGRAM)
        error = {"name": "usage", "message": message, "remedy": remedy, "exit_code": 2}
        print_note(dumps({"error": error}))
        raise click.exceptions.Exit(misuse.exit_code) from None


def _refuse_empty(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    """Refuse an empty value: it is most likely an unset variable of a script."""
    if value == "":
        raise click.BadParameter("it is empty; leave it out to use the configured value")
    return value


@click.group(cls=_Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--server",
    metavar="HOST:PORT",
    callback=_refuse_empty,
    help="The server [default: 127.0.0.1:50051].",
)
@click.option(
    "--cert",
    metavar="FILE",
    callback=_refuse_empty,
    help="Your certificate [default: ~/.worker/client-cert.pem].",
)
@click.option(
    "--key",
    metavar="FILE",
    callback=_refuse_empty,
    help="Its key [default: ~/.worker/client-key.pem].",
)
@click.option(
    "--ca",
    metavar="FILE",
    callback=_refuse_empty,
    help="The server's CA [default: ~/.worker/ca-cert.pem].",
)
@json_option()
@click.version_option(jobworker.__version__, prog_name=PROGRAM)
@pass_invocation
def worker_cli(
    invocation: Invocation,
    server: str | None,
    cert: str | None,
    key: str | None,
    ca: str | None,
) -> None:
    """Run commands on a worker, and watch and stop them.

    Instead of options you can set WORKER_SERVER, WORKER_CERT_PATH, WORKER_KEY_PATH and
    WORKER_CA_PATH, in the environment or in ~/.worker/config, in lines such as export
    WORKER_SERVER="host:50051".

    If the connection breaks, or the service answers nothing for 45 s, not even a ping, a command
    says so on standard error and tries for 2 minutes to connect again. Then it exits with 69. A
    request to run a job is not repeated if the service may have it.
    """
    given = {SERVER: server, CERTIFICATE: cert, KEY: key, CA: ca}
    invocation.options.update({name: value for name, value in given.items() if value is not None})


for _command in (
    run.run,
    jobs.status,
    jobs.stop,
    list_jobs.list_jobs,
    output.log,
    output.rm,
    output.prune,
    jobs.wait,
    session.whoami,
    session.ping,
    volumes.volume,
):
    worker_cli.add_command(_command)


def main() -> None:
    """Run `worker-cli` with the process's arguments."""
    if sys.stdout is not None and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.getLogger("jobworker").addHandler(LogPrinter())
    run_program(PROGRAM, worker_cli)
