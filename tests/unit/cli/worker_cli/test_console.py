"""The program's own streams."""

import os
import pty
import signal
import termios
from pathlib import Path
from typing import Any, TextIO

import pytest
import trio

from jobworker.cli.worker_cli.console import OutputWriter, cancelled_by_interrupt
from jobworker.errors import PrintFailed
from jobworker.model.job import Stream


async def write(file: TextIO | None, data: bytes, visible: bool = False) -> None:
    writer = OutputWriter({Stream.STDOUT: file}, visible=visible)
    writer.put(Stream.STDOUT, data)
    writer.put(Stream.STDERR, b"nowhere")
    await writer.flush()


async def test_what_is_gathered_comes_out_in_order_and_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = list[object]()
    run_sync = trio.to_thread.run_sync

    async def counted(*args: Any, **options: Any) -> object:
        started.append(args)
        return await run_sync(*args, **options)

    monkeypatch.setattr(trio.to_thread, "run_sync", counted)
    with (tmp_path / "both").open("w") as file:
        writer = OutputWriter(dict.fromkeys(Stream, file), visible=False)
        puts = 0
        while writer.has_room:
            writer.put(list(Stream)[puts // 3 % 2], b"%d\n" % puts)
            puts += 1
        await writer.flush()
        assert writer.has_room
    assert puts > 1000
    assert len(started) == 1
    assert (tmp_path / "both").read_bytes() == b"".join(b"%d\n" % i for i in range(puts))


async def test_bytes_are_exact_where_there_is_no_terminal(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    with (tmp_path / "out").open("w") as stream:
        await write(stream, data, visible=True)
    assert (tmp_path / "out").read_bytes() == data


@pytest.mark.parametrize(("visible", "seen"), [(True, b"\\x1b[0m"), (False, b"\x1b[0m")])
async def test_terminal_is_protected_unless_raw_is_asked_for(visible: bool, seen: bytes) -> None:
    master, slave = pty.openpty()
    try:
        modes = termios.tcgetattr(slave)
        modes[1] &= ~termios.OPOST
        termios.tcsetattr(slave, termios.TCSANOW, modes)
        with os.fdopen(slave, "w", closefd=False) as stream:
            await write(stream, b"\x1b[0m", visible=visible)
        assert os.read(master, 100) == seen
    finally:
        os.close(master)
        os.close(slave)


async def test_non_blocking_reader_gets_everything() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    data = b"x" * 1_000_000
    got = b""

    def read_all() -> None:
        nonlocal got
        while len(got) < len(data):
            got += os.read(reading, 65536)

    with os.fdopen(writing, "w") as stream, os.fdopen(reading, "rb"):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, read_all)
            await write(stream, data, visible=False)
    assert got == data


async def test_closed_standard_output_is_told_where_something_is_printed() -> None:
    await write(None, b"", visible=True)  # and what there is for standard error is nobody's
    with pytest.raises(PrintFailed, match="standard output is closed"):
        await write(None, b"x", visible=True)


async def test_reader_that_takes_nothing_does_not_hold_up_an_interrupt() -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w", closefd=False) as stream:
        with trio.fail_after(5), cancelled_by_interrupt() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(write, stream, bytes(1 << 20))
                await trio.lowlevel.checkpoint()
                os.kill(os.getpid(), signal.SIGINT)
        assert scope.cancelled_caught
    os.close(reading)  # the thread's write ends with EPIPE
    os.close(writing)


async def test_interrupts_are_the_callers_again_afterwards() -> None:
    before = signal.getsignal(signal.SIGINT)
    with cancelled_by_interrupt():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


async def test_ignored_interrupts_stay_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with cancelled_by_interrupt() as scope:
            os.kill(os.getpid(), signal.SIGINT)
            await trio.lowlevel.checkpoint()
        assert not scope.cancelled_caught
    finally:
        signal.signal(signal.SIGINT, before)
