"""The trampoline: 400 bytes of machine code in which a prepared child waits for its order.

A child applies its steps in Python and then executes this program. The trampoline waits for `GO` on
the status socket, maps the memory of the order, changes to the working directory and executes the
job's program. Python could do that too. But execve(2) frees the caller's memory, and for a Python
interpreter that takes longer than everything else from the request to the job's first instruction.
A waiting interpreter also costs half a megabyte. So a spare executes the trampoline in advance.

    status socket   the trampoline sends {"ready": true} when it waits, and reads b"go". Then either
                    execve(2) closes the socket, or the trampoline sends a failure.
    order           a memfd with an image that the launcher has written, to be mapped at `IMAGE`:
                    cwd*, argv*, envp*, count, path*[count], then what these pointers point to

The program has no data and a stack of a few words, and copies no input: it follows the pointers of
an image that the launcher made. It tries the paths in order, as execvp(3) does. The source, with a
comment on each call, is in `trampoline_MACHINE.S`; a test assembles it and compares the bytes.

What must hold: a job cannot use the trampoline for anything. Its two descriptors are close-on-exec,
and without them it exits. That is all that a job sees whose program is /proc/self/exe. The memory
that holds the code is sealed.

Standard library only.
"""

import errno
import fcntl
import os
import struct
from collections.abc import Sequence
from typing import NamedTuple

from jobworker.errors import HostUnsupported, ProtocolError, TooLarge
from jobworker.sandbox.start.steps import ChangeDirectory, Execute

GO = b"go"
NOTHING_TO_DO = 127
"""The trampoline's exit status if it gets no order, or has sent a failure."""
IMAGE = 0x10000000
MAX_IMAGE_BYTES = 0x1000000
MAX_NAME_BYTES = 255  # NAME_MAX of <linux/limits.h>
FAILURE = b"t"
"""The first byte of a packet that reports a failure. No packet of `channel` begins with it."""

_CODE = {
    "x86_64": bytes.fromhex(
        "b848000000bf03000000be02000000ba010000000f05b848000000bf040000000f05b801000000bf03000000"
        "488d353a010000ba0f0000000f0531c0bf03000000488d742480ba400000000f054885c00f8e0b010000b809"
        "000000bf00000010be00000001ba0100000041ba0200100041b8040000004531c90f0531db41bcffffffff45"
        "31f64531ff483d000000100f859c00000041ffc7b850000000488b3c25000000100f054885c00f8581000000"
        "41ffc7483b1c25180000107361b83b000000488b3cdd20000010488b342508000010488b1425100000100f05"
        "83f8fe741783f8ec741283f8f375464183fcff440f44e348ffc3ebbb4189c5b815000000488b3cdd20000010"
        "31f60f054885c04489e8740548ffc3eb9a41ffc6eb13b8f3ffffff4489e34183fcff7505b8feffffffc74424"
        "807400000044897c248489442488895c248c4489742490b801000000bf03000000488d742480ba140000000f"
        "05b8e7000000bf7f0000000f05697b227265616479223a747275657d"
    ),
    "aarch64": bytes.fromhex(
        "280380d2600080d2410080d2220080d2010000d4280380d2800080d2410080d2220080d2010000d4080880d2"
        "600080d2410a0010e20180d2010000d4ff0302d1e80780d2600080d2e1030091020880d2010000d41f0000f1"
        "ad080054c81b80d20000a2d20120a0d2220080d2430080520302a072840080d2050080d2010000d41300a2d2"
        "140080d21500801216008052170080521f0013eb8105005437008052280680d2600240f9010000d4e00400b5"
        "57008052690e40f99f0209ebc203005478820091a81b80d2007b74f8610640f9620a40f9010000d41f080031"
        "200100541f500031e00000541f340031e1020054bf0600319502951a94060091eeffff17f903002a080680d2"
        "600c8092017b74f8020080d2010000d4e90300aae003192a690000b494060091e3ffff173600805206000014"
        "80018012f403152abf0600314100005420008012890e8052e95f0029e0530129f61300b9080880d2600080d2"
        "e1030091820280d2010000d4c80b80d2e00f80d2010000d4697b227265616479223a747275657d"
    ),
}
_ELF_MACHINES = {"x86_64": 62, "aarch64": 183}
_BASE, _HEADER_BYTES = 0x400000, 64 + 56
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_MFD_EXEC = 0x10


STEPS = ("take-order", "change-directory", "execute")
"""The names of its steps, by the number in a failure. The last two are in `sandbox.start.steps`."""


def program(machine: str) -> bytes:
    """The trampoline as an ELF executable for `machine`, "x86_64" or "aarch64"."""
    return executable(machine, _CODE[machine])


def executable(machine: str, code: bytes) -> bytes:
    """An ELF executable: a header, one segment (read, execute) and `code`, see elf(5)."""
    size = _HEADER_BYTES + len(code)
    identity = b"\x7fELF" + bytes((2, 1, 1)) + bytes(9)
    entry = _BASE + _HEADER_BYTES
    header = struct.pack(
        "<HHIQQQIHHHHHH", 2, _ELF_MACHINES[machine], 1, entry, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, 0x1000)
    return identity + header + segment + code


def open_program() -> int:
    """A descriptor of the executable in sealed memory, close-on-exec. Raises HostUnsupported."""
    return keep_program("trampoline", program(os.uname().machine))


def keep_program(name: str, content: bytes) -> int:
    """A descriptor of a sealed memfd with the executable `content`, close-on-exec.

    Raises HostUnsupported.
    """
    try:
        descriptor = _executable_memory(name)
        os.write(descriptor, content)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    except OSError as error:
        raise HostUnsupported(
            f"cannot keep a program in memory: {error.strerror}",
            remedy="set the sysctl vm.memfd_noexec to 0 or 1",
        ) from error
    return descriptor


def _executable_memory(name: str) -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create(name, flags | _MFD_EXEC)
    except OSError as error:
        if error.errno != errno.EINVAL:  # Linux before 6.3 has no such flag, and needs none
            raise
        return os.memfd_create(name, flags)


class ExecImage(NamedTuple):
    """The image for the trampoline, and the texts that a report of its failure needs."""

    image: bytes
    directory: str
    name: str
    paths: Sequence[str]
    """The paths at which the program is looked for."""


def exec_image(change: ChangeDirectory, execute: Execute) -> ExecImage:
    """The last two steps of a plan as an image for the trampoline.

    Raises TooLarge if the image is larger than `MAX_IMAGE_BYTES`, 16 MiB.
    """
    name = execute.arguments[0]
    paths = _candidates(name, dict(execute.environment).get("PATH", ""))
    return ExecImage(_image(change.path, execute, paths), change.path, name, paths)


def _image(directory: str, execute: Execute, paths: Sequence[str]) -> bytes:
    arguments = execute.arguments
    variables = [f"{key}={value}" for key, value in execute.environment]
    pointers = 4 + len(paths) + len(arguments) + 1 + len(variables) + 1
    texts: list[bytes] = []
    at = IMAGE + 8 * pointers

    def place(text: str) -> int:
        nonlocal at
        here = at
        texts.append(text.encode() + b"\0")
        at += len(texts[-1])
        return here

    argv = IMAGE + 8 * (4 + len(paths))
    envp = argv + 8 * (len(arguments) + 1)
    words = [place(directory), argv, envp, len(paths), *map(place, paths)]
    words += [*map(place, arguments), 0, *map(place, variables), 0]
    if at > IMAGE + MAX_IMAGE_BYTES:
        raise TooLarge(
            f"cannot run {arguments[0][:64]!r}: arguments, environment and PATH take over 16 MiB",
            data={"step": "execute", "errno": errno.E2BIG, "detail": arguments[0][:64]},
        )
    return struct.pack(f"<{pointers}Q", *words) + b"".join(texts)


def _candidates(name: str, search: str) -> list[str]:
    """The paths to try for the program `name`, with `search` as PATH: execvp(3)."""
    if "/" in name:
        return [name]
    if len(name.encode()) > MAX_NAME_BYTES:  # no directory can have such a name
        return []
    return [f"{directory or '.'}/{name}" for directory in dict.fromkeys(search.split(":"))]


def failure_from(packet: bytes, exec_image: ExecImage) -> dict[str, object]:
    """The failure in a packet that begins with `FAILURE`, as `{"step", "errno", "detail"}`.

    Raises ProtocolError for a packet that the trampoline does not send.
    """
    try:
        _, step, code, index, lacks_interpreter = struct.unpack("<5i", packet)
        name = STEPS[step]
    except (struct.error, IndexError):
        raise ProtocolError("cannot read the trampoline's report: it is malformed") from None
    detail = exec_image.directory if name == "change-directory" else exec_image.name
    if name == "execute" and 0 <= index < len(exec_image.paths):
        detail = exec_image.paths[index] + (" (its interpreter)" if lacks_interpreter else "")
    return {"step": name, "errno": -code, "detail": detail}
