"""The child: the process that applies `prepare` and then executes the trampoline or the init.

The launcher clones it, for a spare before any request. If a step fails, the child sends one message
`{"failed": {"step", "errno", "detail"}}` and exits; the kernel removes its namespaces and mounts.
Otherwise it executes the trampoline, which waits for the order and executes the job's program.

Standard library only. The child imports nothing after the clone.
"""

import os
import socket
from collections.abc import Sequence
from typing import NoReturn

from jobworker.sandbox import channel
from jobworker.sandbox.start.apply import STATUS_DESCRIPTOR, StepContext, StepFailed, apply
from jobworker.sandbox.start.steps import Step


def become_job(prepare: Sequence[Step], context: StepContext) -> NoReturn:
    """Apply `prepare` in the cloned process; its last step executes another program.

    Never returns: if a step fails, this reports the failure to the launcher and exits with 127.
    """
    try:
        apply(prepare, context)
    except StepFailed as failure:
        _report(context.status, failure.step, failure.code, failure.detail)
    except BaseException as fault:  # noqa: BLE001 - this process must not return to the launcher's code
        _report(context.status, "prepare", 0, f"{type(fault).__name__}: {fault}")
    finally:
        os._exit(127)


def _report(descriptor: int, step: str, code: int, detail: str) -> None:
    message: channel.Message = {"failed": {"step": step, "errno": code, "detail": detail}}
    try:
        channel.send(socket.socket(fileno=descriptor), message)
    except OSError:  # the step keep-own-descriptors has moved the socket
        channel.send(socket.socket(fileno=STATUS_DESCRIPTOR), message)
