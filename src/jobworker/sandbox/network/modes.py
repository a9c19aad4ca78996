"""Provides a job's network by its mode: names for its files, a gateway and a wall.

The wall (`sandbox.start.wall`) closes the addresses of the host. The kernel notifies the launcher
when these change (rtnetlink(7)), and the launcher replaces every wall then.

Standard library only.
"""

from typing import NamedTuple

from jobworker.errors import SandboxError
from jobworker.sandbox import netlink
from jobworker.sandbox.cgroup.hierarchy import JobScope, ScopeLimits
from jobworker.sandbox.network.gateway import GatewayParameters, start_gateway
from jobworker.sandbox.network.slirp import (
    PROCESSES,
    Layout,
    choose_layout,
    find_program,
    resolv_conf,
)
from jobworker.sandbox.start import wall
from jobworker.sandbox.start.plan import Order, OwnNetwork, RootView
from jobworker.sandbox.start.private_network import PROGRAM
from jobworker.sandbox.start.steps import ROOT


class HostAddresses(NamedTuple):
    """The IPv4 addresses of the host."""

    addresses: tuple[tuple[str, int], ...]
    """Each address, with the length of its network's prefix in bits."""
    local: tuple[wall.Range, ...]
    """All addresses whose packets the kernel delivers to the host itself, with broadcasts."""


def read_host() -> HostAddresses:
    """The host's addresses as they are now. Raises OSError."""
    addresses = netlink.addresses()
    alone = [wall.range_of(address) for address, _ in addresses]
    local = [wall.range_of(f"{first}/{length}") for first, length in netlink.local_networks()]
    return HostAddresses(tuple(addresses), wall.merged([*alone, *local]))


class Networks:
    """Describes and starts the networks of jobs, and knows the host's addresses."""

    def __init__(self, view: RootView, first_uid: int, landlock: int | None) -> None:
        self.changes = netlink.AddressMonitor()
        """Readable when the host's addresses may have changed: see `refresh`."""
        self.host, self._stale = read_host(), False
        self._view, self._landlock = view, landlock
        self._trees = {layer.at: layer.lower[-1] for layer in view.layers} or {"": ROOT}
        self._first_uid = first_uid
        """The first user id of gateways. There is one id for each job that may be live."""

    def describe(self, order: Order | None) -> tuple[OwnNetwork | None, Layout | None]:
        """The network that `order` asks for, and its layout if it has a gateway.

        Both are None for the host's network. Raises SandboxError if this host has no slirp4netns.
        """
        if order is None or order.network == "host":
            return None, None
        if order.network == "none":
            return OwnNetwork(order.hostname), None
        self._program()
        layout = choose_layout(self.host.addresses)
        try:
            with open(
                f"{self._trees['']}/etc/resolv.conf", encoding="utf-8", errors="replace"
            ) as file:
                resolvers = resolv_conf(file.read(), layout)
        except FileNotFoundError:
            resolvers = ""  # the host has no such file, so the job needs none
        return OwnNetwork(order.hostname, layout.address, resolvers, has_gateway=True), layout

    def refresh(self) -> bool:
        """Read the host's addresses again after a notification, and return whether they differ.

        Raises OSError; then the next call reads them again.
        """
        self._stale = self.changes.drain() or self._stale
        if not self._stale:
            return False
        before, self.host = self.host, read_host()
        self._stale = False
        return self.host.local != before.local

    def wall_for(self, layout: Layout) -> bytes:
        """The program of the wall for a job with this layout and the host's present addresses."""
        network = f"{layout.prefix}.0/24"
        return wall.program(layout.address, layout.resolver, network, self.host.local)

    def open_gateway(self, layout: Layout, index: int, scope: JobScope) -> tuple[int, int, int]:
        """Start the gateway for the job in place `index`: see `start_gateway`."""
        uid = self._first_uid + index
        parameters = GatewayParameters(
            layout=layout,
            program=self._program(),
            view=self._view,
            uid=uid,
            scope=scope,
            landlock=self._landlock,
        )
        return start_gateway(parameters)

    def _program(self) -> str:
        program = find_program(self._trees)
        if program is None:
            raise SandboxError(
                f"this host lacks {PROGRAM}, which the network private needs",
                data={"step": "network"},
            )
        return program


def room_beside(limits: ScopeLimits, order: Order) -> ScopeLimits:
    """The limits of a job's scope, with room for the processes of its init and its gateway.

    So the job itself may have as many processes as it asked for.
    """
    if not limits.pids:
        return limits
    pids = limits.pids + order.init
    if order.network == "private":
        pids = max(pids + 1, pids - limits.pids + 1 + PROCESSES)
    return limits._replace(pids=pids)
