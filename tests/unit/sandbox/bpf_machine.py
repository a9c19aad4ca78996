"""A machine for seccomp's BPF programs: what would the kernel answer to this call?"""

import struct

ALLOW = 0x7FFF0000
EPERM, ENOSYS = 0x00050001, 0x00050026
ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7, "i386": 0x40000003}


def run(
    program: bytes, number: int, arguments: tuple[int, ...] = (), machine: str = "x86_64"
) -> int:
    """The value that `program` returns: <linux/filter.h>, as far as libseccomp goes."""
    padded = (*arguments, *(0,) * (6 - len(arguments)))
    data = struct.pack("=iIQ6Q", number, ARCHITECTURE[machine], 0, *padded)
    code = list(struct.iter_unpack("=HBBI", program))
    at = accumulator = 0
    while True:
        operation, yes, no, value = code[at]
        at += 1
        if operation == 0x20:  # BPF_LD | BPF_W | BPF_ABS
            accumulator = struct.unpack_from("=I", data, value)[0]
        elif operation == 0x54:  # BPF_ALU | BPF_AND | BPF_K
            accumulator &= value
        elif operation == 0x05:  # BPF_JMP | BPF_JA
            at += value
        elif operation == 0x15:
            at += yes if accumulator == value else no
        elif operation == 0x25:
            at += yes if accumulator > value else no
        elif operation == 0x35:
            at += yes if accumulator >= value else no
        elif operation == 0x06:
            return int(value)
        else:
            raise AssertionError(f"no operation {operation:#x} is known here")


def answer(programs: list[bytes], number: int, *arguments: int, machine: str = "x86_64") -> int:
    """What the kernel makes of the programs' answers, which were installed in this order."""
    result = ALLOW
    for program in reversed(programs):
        said = run(program, number, arguments, machine)
        if said & 0x7FFF0000 < result & 0x7FFF0000:  # the severer action; the newest among equals
            result = said
    return result
