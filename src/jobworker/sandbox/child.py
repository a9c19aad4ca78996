"""The process that becomes a job: prepares, waits for its order, and executes the program.

It is cloned by the launcher, ahead of any request where a spare is kept. Its one way out is
execve(2): the socket to the launcher closes with it, and this end of stream is how the
launcher learns that the program runs. Whatever goes wrong before is told in one message
`{"failed": {"step", "errno", "detail"}}`, and the process ends; its namespaces and mounts end
with it.

Standard library only, and nothing is imported once the process has been cloned.
"""

import os
import socket
from collections.abc import Sequence
from typing import NoReturn

from jobworker.errors import ProtocolError
from jobworker.sandbox import channel
from jobworker.sandbox.apply import STATUS_DESCRIPTOR, Means, StepFailed, apply
from jobworker.sandbox.plan import Order, finish
from jobworker.sandbox.steps import KeepOwnDescriptors, Step

READY: channel.Message = {"ready": True}


def become_job(prepare: Sequence[Step], means: Means) -> NoReturn:
    """Run in the cloned process: apply `prepare`, take the order, finish. Never returns."""
    status = means.status
    try:
        for step in prepare:
            apply((step,), means)
            if isinstance(step, KeepOwnDescriptors):
                status = STATUS_DESCRIPTOR
        sock = socket.socket(fileno=status)
        channel.send(sock, READY)
        received = channel.receive(sock)
        if received is not None:
            apply(finish(order_from(received[0])), means)
    except StepFailed as failure:
        _tell(status, failure.step, failure.code, failure.detail)
    except BaseException as fault:  # noqa: BLE001 - this process must not return, whatever befalls it
        _tell(status, "prepare", 0, f"{type(fault).__name__}: {fault}")
    finally:
        os._exit(127)


def order_message(order: Order) -> channel.Message:
    """What the launcher sends for `order`."""
    return {
        "hostname": order.hostname,
        "arguments": list(order.arguments),
        "environment": dict(order.environment),
        "workdir": order.workdir,
        "network": order.network,
        "uid": order.uid,
        "gid": order.gid,
    }


def order_from(message: channel.Message) -> Order:
    """The order that `order_message` made."""
    hostname, workdir = message["hostname"], message["workdir"]
    network, uid, gid = message["network"], message["uid"], message["gid"]
    arguments, environment = message["arguments"], message["environment"]
    if not (
        isinstance(hostname, str)
        and isinstance(workdir, str)
        and isinstance(arguments, list)
        and isinstance(environment, dict)
        and isinstance(network, str)
        and isinstance(uid, int)
        and isinstance(gid, int)
    ):
        raise ProtocolError("cannot take the order: its fields are of the wrong types")
    return Order(hostname, tuple(arguments), environment, workdir, network, uid, gid)


def _tell(descriptor: int, step: str, code: int, detail: str) -> None:
    sock = socket.socket(fileno=descriptor)
    channel.send(sock, {"failed": {"step": step, "errno": code, "detail": detail}})
