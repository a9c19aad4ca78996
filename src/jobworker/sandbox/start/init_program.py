"""The init of a job that asks for one: PID 1 in front of its program, in 400 bytes of machine code.

The init clones one child, which becomes the trampoline and then the job's program. From then on it
only waits. It forwards each signal that it receives to the program, for which signals have their
default actions; the kernel gives PID 1 none (pid_namespaces(7)). It reaps orphans, which would
otherwise count as processes of the job. When the program ends, the init exits and the kernel kills
the rest of the job. It first reports the program's wait status (wait(2)) to the launcher, since a
PID 1 cannot die of a signal like SIGTERM and show it in its own status.

    5  the trampoline    executed by descriptor, then closed in the init
    6  report            a pipe; the init writes four bytes to it when the program ends

What must hold: the program gets at nothing of the launcher's through the init. Only the report
stays open, close-on-exec. The init is not dumpable, so the job can read neither its memory nor its
links in /proc (prctl(2), PR_SET_DUMPABLE). The memory that holds its code is sealed. The program
has a session of its own, so a signal to its process group does not come back to the init.

Standard library only.
"""

import os

from jobworker.sandbox.start.trampoline import executable, keep_program

_CODE = {
    "x86_64": bytes.fromhex(
        "4883ec40b89d000000bf0400000031f60f05b848000000bf05000000be02000000ba010000000f054885c00f"
        "88ee000000b848000000bf060000000f054885c00f88d900000048c70424ffffffffb80e00000031ff4889e6"
        "31d241ba080000000f05b838000000bf1100000031f631d24531d24531c00f054885c00f889e0000000f849f"
        "00000089c3b8b401000031ffbe0500000031d20f05b8800000004889e731f631d241ba080000000f0583f811"
        "741185c07ee389c6b83e00000089df0f05ebd6b83d00000048c7c7ffffffff488d742408ba010000004531d2"
        "0f0585c07eb739d875ddb801000000bf06000000488d742408ba040000000f058b7c240889f883e07f74088d"
        "b880000000eb09c1ef0881e7ff000000b8e70000000f05bf7f000000ebf2b8700000000f0548c70424000000"
        "00b80e000000bf020000004889e631d241ba080000000f05488d0533000000488944241048c7442418000000"
        "00b842010000bf05000000488d351e000000488d5424104c8d54241841b8001000000f05eb997472616d706f"
        "6c696e6500"
    ),
    "aarch64": bytes.fromhex(
        "ff0301d1e81480d2800080d2010080d2010000d4280380d2a00080d2410080d2220080d2010000d48008f8b7"
        "280380d2c00080d2410080d2220080d2010000d4c007f8b709008092e90300f9e81080d2000080d2e1030091"
        "020080d2030180d2010000d4881b80d2200280d2010080d2020080d2030080d2040080d2010000d4c005f8b7"
        "e00500b4f303002a883680d2000080d2a10080d2020080d2010000d4281180d2e0030091010080d2020080d2"
        "030180d2010000d41f440071000100541f000071edfeff54e103002a281080d2e003132a010000d4f2ffff17"
        "882080d200008092e1230091220080d2030080d2010000d41f0000714dfdff541f00136be1feff54080880d2"
        "c00080d2e1230091820080d2010000d4e90b40b920190072600000540000021102000014203d0853c80b80d2"
        "010000d4e00f80d2fdffff17a81380d2010000d4ff0300f9e81080d2400080d2e1030091020080d2030180d2"
        "010000d469010010e90b00f9ff0f00f9282380d2a00080d201010050e2430091e3630091040082d2010000d4"
        "ebffff177472616d706f6c696e6500"
    ),
}


def program(machine: str) -> bytes:
    """The init as an ELF executable for `machine`, "x86_64" or "aarch64"."""
    return executable(machine, _CODE[machine])


def open_init() -> int:
    """A descriptor of the executable in sealed memory, close-on-exec. Raises HostUnsupported."""
    return keep_program("init", program(os.uname().machine))


def reported(report: int) -> tuple[int | None, int | None] | None:
    """The exit code and the signal of the program, one of them None, read from the init's pipe.

    None if the init ended before the program.
    """
    try:
        status_bytes = os.read(report, 4)
    except BlockingIOError:
        return None
    if len(status_bytes) != 4:
        return None
    status = os.waitstatus_to_exitcode(int.from_bytes(status_bytes, "little"))
    return (None, -status) if status < 0 else (status, None)
