"""Each attempt reaches its aim outside; inside it fails, by the filter and, but for some, without.

The names of the attempts say what is attacked. What came of one is an errno's name: "done" and
"value" are success.
"""

import pytest

from . import attempts_calls, attempts_files
from .attempt import ATTEMPTS
from .conftest import Outcomes

assert attempts_calls, attempts_files  # they fill the table of attempts

REFUSED = {"EPERM", "EACCES", "ENOENT", "ESRCH", "ENXIO", "EROFS", "masked", "ENOTSUP"}
"""The last one by the overlay, which has no handles of files to give."""
DENIED = {"EPERM", "ENOSYS"}
OF_A_PROTOCOL = {
    *("open_socket_multipath_tcp", "open_socket_multipath_tcp_with_high_bits"),
    *("open_socket_sctp", "open_socket_dccp", "open_socket_smc"),
    *("open_socket_l2tp", "open_socket_udp_lite"),
    *("open_socket_sctp_by_its_kind", "open_socket_dccp_by_its_kind"),
}
"""They are answered as by a kernel without the protocol."""

BY_THE_FILTER_ALONE = {
    # A user namespace is for everyone to make; inside one of its own a job would have rights.
    *("unshare_user_namespace", "unshare_user_namespace_beside_harmless_flags"),
    *("clone_user_namespace", "clone_user_namespace_with_high_bits", "clone3_user_namespace"),
    # A terminal of the job's own obeys the job.
    *("type_into_a_terminal", "type_into_a_terminal_with_high_bits", "paste_into_a_terminal"),
    *("paste_into_a_terminal_with_high_bits", "set_a_line_discipline"),
    *("open_socket_vsock", "open_socket_vsock_with_high_bits", "open_socket_alg"),
    *("open_socket_netlink_audit", "open_socket_netlink_netfilter", "open_socket_netlink_uevent"),
    *OF_A_PROTOCOL,
    *("attach_a_filter_to_a_socket", "attach_a_filter_with_high_bits"),
    *("take_other_code_above_tcp", "sign_connections", "name_the_senders_of_a_group"),
    "take_a_label_of_ipv6_flows",
    *("take_huge_pages_by_a_mapping", "take_huge_pages_by_a_memory_file"),
    # Calls with arguments that mean nothing: the kernel's word about those comes first.
    *(f"call_{name}" for name in attempts_calls.RAW),
    *("call_the_next_number_to_come", "call_socketpair_of_another_family"),
}

NEEDS = {
    **dict.fromkeys(
        ("raise_core_limit", "raise_file_limit", "raise_locked_memory_limit"), "CAP_SYS_RESOURCE"
    ),
    "evade_the_oom_killer": "CAP_SYS_RESOURCE",
    "open_sysrq_trigger": "CONFIG_MAGIC_SYSRQ",
    "read_kcore": "CONFIG_PROC_KCORE",
    "open_socket_alg": "CONFIG_CRYPTO_USER_API",
    "open_socket_vsock": "CONFIG_VSOCKETS",
    "open_socket_vsock_with_high_bits": "CONFIG_VSOCKETS",
    "open_socket_xdp": "CONFIG_XDP_SOCKETS",
    "open_socket_packet": "CONFIG_PACKET",
    "open_socket_packet_datagram": "CONFIG_PACKET",
    **dict.fromkeys(OF_A_PROTOCOL, "the protocol"),
    "read_kernel_configuration": "CONFIG_IKCONFIG_PROC",
    "call_the_next_number_to_come": "a call newer than the profile",
    "mount_control_groups_of_version_1": "CONFIG_CGROUPS_V1",
    **{f"call_{name}": f"the call {name}" for name in attempts_calls.RAW},
}
"""What the host has to have for the control; what it lacks cannot be attacked there."""

LACKING = {
    *("ENOSYS", "ENOENT", "EAFNOSUPPORT", "EPERM", "EACCES", "ENODEV"),
    *("EPROTONOSUPPORT", "ESOCKTNOSUPPORT"),
}


def test_the_program_made_every_attempt(outcomes: Outcomes) -> None:
    for made in (outcomes.outside, outcomes.inside, outcomes.unfiltered):
        assert set(made) == set(ATTEMPTS)
        assert not [name for name, outcome in made.items() if outcome.startswith("broken")], made


@pytest.mark.parametrize("name", ATTEMPTS)
def test_attempt_fails_inside(outcomes: Outcomes, name: str) -> None:
    """Whatever the host: first of all, it fails."""
    if name in OF_A_PROTOCOL:
        assert outcomes.inside[name] == "EPROTONOSUPPORT"
        return
    allowed = DENIED if name.startswith("call_") else REFUSED | DENIED
    assert outcomes.inside[name] in allowed
    if name not in BY_THE_FILTER_ALONE:
        assert outcomes.unfiltered[name] in REFUSED, "without the filter another layer holds"


@pytest.mark.parametrize("name", ATTEMPTS)
def test_attempt_reaches_its_aim_outside(outcomes: Outcomes, name: str) -> None:
    """The control: without the sandbox the kernel does it, or looks at what it was given."""
    outcome = outcomes.outside[name]
    if name in NEEDS and outcome in LACKING and not _is_argument_error(name, outcome):
        pytest.skip(f"the control needs {NEEDS[name]} on this host")
    if name.startswith(("call_", "write_its_memory", "paste_into")):
        assert outcome not in DENIED, outcome
    else:
        assert outcome == "done" or outcome.startswith("value: ["), outcome


def _is_argument_error(name: str, outcome: str) -> bool:
    """Whether the kernel has looked at what a call was given."""
    return name.startswith("call_") and outcome not in DENIED


@pytest.mark.parametrize("name", sorted(BY_THE_FILTER_ALONE))
def test_what_the_filter_alone_refuses_is_refused_by_it(outcomes: Outcomes, name: str) -> None:
    """Where nothing else would have refused it, the difference is the filter's."""
    assert outcomes.inside[name] in (DENIED if name not in OF_A_PROTOCOL else {"EPROTONOSUPPORT"})
    without = outcomes.unfiltered[name]
    if without in ("ENOSYS", "EAFNOSUPPORT", "EPROTONOSUPPORT", "ESOCKTNOSUPPORT"):
        pytest.skip(f"this kernel lacks {NEEDS[name]}")
    assert without != outcomes.inside[name] or without == "EPERM", "EPERM: by another layer too"
