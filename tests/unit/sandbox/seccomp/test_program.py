"""The programs as the launcher takes them: whole, or not at all."""

import base64
import struct
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker.errors import HostUnsupported
from jobworker.sandbox.seccomp.compile import load_filters
from jobworker.sandbox.seccomp.program import Filters, filters_from, filters_message, try_out

from ....descriptors import descriptors
from ...strategies import examples

SOUND = filters_message(load_filters(""))
RETURN_ALLOW = struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000)


def test_programs_arrive_as_they_were_sent() -> None:
    assert filters_from(SOUND) == load_filters("")


@pytest.mark.parametrize("which", ["listed", "quiet"])
@pytest.mark.parametrize(
    "program",
    [
        *("", None, 8, "####", [1], base64.b64encode(bytes(7)).decode()),
        base64.b64encode(bytes(8 * 4097)).decode(),
    ],
)
def test_launcher_refuses_to_run_without_whole_programs(which: str, program: object) -> None:
    with pytest.raises(HostUnsupported, match="the system-call filter is missing or no BPF"):
        filters_from({**SOUND, which: program})
    with pytest.raises(HostUnsupported):
        filters_from({key: value for key, value in SOUND.items() if key != which})


@examples(max_examples=100)
@given(st.text() | st.binary() | st.none() | st.integers())
def test_whatever_stands_for_a_program_is_taken_or_refused(program: object) -> None:
    try:
        taken = filters_from({**SOUND, "listed": program})
    except HostUnsupported:
        return
    assert len(taken.listed) % 8 == 0


def test_kernel_takes_the_programs() -> None:
    try_out(load_filters(""))


@pytest.mark.parametrize(
    "program",
    [
        bytes(8),  # loads from an address that the kernel does not allow, and does not return
        struct.pack("=HBBI", 0x20, 0, 0, 0),  # does not end with a return
        struct.pack("=HBBI", 0x05, 0, 0, 9) + RETURN_ALLOW,  # jumps out of itself
    ],
)
def test_program_that_the_kernel_does_not_take_is_refused_with_its_reason(program: bytes) -> None:
    with pytest.raises(HostUnsupported, match="cannot filter system calls: Invalid argument"):
        try_out(Filters(program, RETURN_ALLOW, False))
    with pytest.raises(HostUnsupported, match="cannot filter system calls: Invalid argument"):
        try_out(Filters(RETURN_ALLOW, program, False))


def test_trial_leaves_no_process_and_no_descriptor() -> None:
    own = f"/proc/self/task/{threading.get_native_id()}/children"
    before = descriptors(), Path(own).read_text()
    try_out(Filters(RETURN_ALLOW, RETURN_ALLOW, True))
    assert (descriptors(), Path(own).read_text()) == before
