"""`worker`: the service and its administration."""

import sys

from jobworker.server.startup.process_setup import defer_hangups

if sys.argv[1:2] in (["serve"], ["launcher"]):
    defer_hangups()  # a SIGHUP may arrive during the imports below, which take tenths of a second

from pathlib import Path
from typing import TYPE_CHECKING

import asyncclick as click

import jobworker
from jobworker.cli.command_line.failures import print_text, run_program
from jobworker.cli.command_line.parameters import config_option, prune_options
from jobworker.cli.worker.audit import audit
from jobworker.cli.worker.certs import certs
from jobworker.standard_streams import fill_standard_streams

if TYPE_CHECKING:
    from jobworker.config.settings import Settings


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(jobworker.__version__, prog_name="worker")
def worker() -> None:
    """Run other people's commands on this host, without giving them the host."""


@worker.command()
@config_option
@click.option(
    "--launcher-socket",
    type=click.Path(path_type=Path),
    help="Socket of a launcher that outlives the service [default: launcher.socket].",
)
async def serve(config: Path | None, launcher_socket: Path | None) -> None:
    """Serve clients until SIGTERM or SIGINT."""
    from jobworker.server.startup.process_setup import ignore_hangups, set_up_process

    stderr = set_up_process()  # before the other imports, which take tenths of a second
    settings = _settings(config, launcher_socket)  # a bad configuration is refused before them

    from jobworker.server.host import memory
    from jobworker.server.reporting.logs import set_up_logging
    from jobworker.server.service import serve as serve_until_signal
    from jobworker.server.startup.preparation import prepare

    set_up_logging(settings.logging.level, settings.logging.format)
    prepared = prepare(settings, config)
    memory.set_up()
    stderr.start_thread()
    try:
        await serve_until_signal(prepared)
    finally:
        ignore_hangups()


@worker.command()
@config_option
@click.option(
    "--socket",
    "launcher_socket",
    type=click.Path(path_type=Path),
    help="Socket to listen on [default: launcher.socket of the configuration].",
)
async def launcher(config: Path | None, launcher_socket: Path | None) -> None:
    """Start jobs for a service, and keep them while no service runs, until SIGTERM.

    A service uses this launcher if its configuration names the socket (launcher.socket). Launcher
    and service read the same configuration.
    """
    from jobworker.server.startup.process_setup import ignore_hangups, set_up_process

    set_up_process()
    ignore_hangups()  # a launcher does not reload its configuration

    from jobworker.server.startup.launcher import become_launcher

    become_launcher(_settings(config, launcher_socket))


def _settings(config: Path | None, launcher_socket: Path | None) -> "Settings":
    from jobworker.config.settings import Settings, load, with_launcher_socket

    settings = Settings() if config is None else load(config)
    if launcher_socket is not None:
        settings = with_launcher_socket(settings, launcher_socket)
    return settings


@worker.command()
@config_option
@click.option("--json", is_flag=True, help="One JSON object, for programs.")
async def check(config: Path | None, json: bool) -> int:
    """Test all that jobs and service need of this host; exit with 1 if something is missing."""
    from jobworker.cli.worker.check import run_check

    return await run_check(config, json=json)


worker.add_command(certs)
worker.add_command(audit)


@worker.command()
@config_option
@prune_options
def prune(
    config: Path | None, older_than: float | None, keep: int | None, max_size: int | None
) -> None:
    """Remove ended jobs' output on this host, whether or not the service runs.

    Without options, it applies the configuration. Output of a job that has not ended stays, and so
    does output that a client follows.
    """
    from jobworker.cli.worker.prune import prune_here

    print_text(prune_here(config, older_than=older_than, keep=keep, max_size=max_size))


@worker.command()
@click.option("--serve", "stay", is_flag=True, help="Keep the service; print how to connect.")
async def demo(stay: bool) -> int:
    """Demonstrate jobworker: start a service, run jobs, measure their limits, clean up."""
    from jobworker.cli.worker.demo import run_demo

    return await run_demo(stay=stay)


def main() -> None:
    """Run `worker` with the process's arguments."""
    fill_standard_streams()
    run_program("worker", worker)
