"""The process that becomes a job: prepares itself, and executes the trampoline.

It is cloned by the launcher, ahead of any request where a spare is kept. Its one way out is
execve(2): of the trampoline, which waits for the order and executes the job's program. Whatever
goes wrong before is told in one message `{"failed": {"step", "errno", "detail"}}`, and the process
ends; its namespaces and mounts end with it.

Standard library only, and nothing is imported once the process has been cloned.
"""

import os
import socket
from collections.abc import Sequence
from typing import NoReturn

from jobworker.sandbox import channel
from jobworker.sandbox.start.apply import STATUS_DESCRIPTOR, Means, StepFailed, apply
from jobworker.sandbox.start.steps import Step


def become_job(prepare: Sequence[Step], means: Means) -> NoReturn:
    """Run in the cloned process: apply `prepare`, whose last step ends this program."""
    try:
        apply(prepare, means)
    except StepFailed as failure:
        _tell(means.status, failure.step, failure.code, failure.detail)
    except BaseException as fault:  # noqa: BLE001 - this process must not return, whatever befalls it
        _tell(means.status, "prepare", 0, f"{type(fault).__name__}: {fault}")
    finally:
        os._exit(127)


def _tell(descriptor: int, step: str, code: int, detail: str) -> None:
    told: channel.Message = {"failed": {"step": step, "errno": code, "detail": detail}}
    try:
        channel.send(socket.socket(fileno=descriptor), told)
    except OSError:  # it is in its final place already
        channel.send(socket.socket(fileno=STATUS_DESCRIPTOR), told)
