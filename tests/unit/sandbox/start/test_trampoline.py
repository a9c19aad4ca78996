"""The trampoline: executed for real, with an order of the test's own."""

import errno
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker.errors import ProtocolError, TooLarge
from jobworker.sandbox import channel
from jobworker.sandbox.start import trampoline
from jobworker.sandbox.start.steps import ChangeDirectory, Execute

from ...strategies import examples, texts

SOURCES = Path(trampoline.__file__).parent
Run = Callable[..., tuple[dict[str, object] | None, bytes, int]]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Has a trampoline run an image: the failure if any, standard output, the exit status."""
    program = trampoline.open_program()

    def go(
        *arguments: str, cwd: str = "/", word: bytes = trampoline.GO, **environment: str
    ) -> tuple[dict[str, object] | None, bytes, int]:
        exec_image = trampoline.exec_image(
            ChangeDirectory(cwd), Execute(arguments, tuple(environment.items()))
        )
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        output = (tmp_path / "output").open("w+b")
        with ours, theirs, output, (tmp_path / "order").open("w+b") as order:
            order.write(exec_image.image)
            order.flush()
            pid = os.fork()
            if pid == 0:
                os.dup2(output.fileno(), 1)
                os.dup2(theirs.fileno(), 103)
                os.dup2(order.fileno(), 104)
                os.dup2(103, 3)
                os.dup2(104, 4)
                os.closerange(103, 105)
                os.execve(program, ["trampoline"], {})
            theirs.close()
            said = channel.receive(ours)
            assert said == ({"ready": True}, [])
            if word:
                ours.send(word)
            else:
                ours.shutdown(socket.SHUT_WR)
            packet = ours.recv(4096)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            output.seek(0)
            failure = trampoline.failure_from(packet, exec_image) if packet else None
            return failure, output.read(), status

    yield go
    os.close(program)


def test_program_gets_arguments_environment_and_directory_to_the_byte(run: Run) -> None:
    script = 'printf "%s|" "$@"; pwd; env'
    failure, output, status = run(
        "/bin/sh", "-c", script, "sh", "a b", "", "é\n", "-x", cwd="/usr", A="1", EMPTY=""
    )
    assert (failure, status) == (None, 0)
    arguments, _, rest = output.decode().partition("/usr\n")
    assert arguments == "a b||é\n|-x|"
    assert {"A=1", "EMPTY=", "PWD=/usr"} <= set(rest.splitlines())


def test_job_inherits_none_of_the_descriptors(run: Run) -> None:
    failure, output, _ = run("/bin/ls", "/proc/self/fd")
    assert failure is None
    assert {"3", "4"} & set(output.decode().split()) <= {"3"}  # 3 is ls's own directory


def test_largest_order_passes(run: Run) -> None:
    arguments = ["/bin/sh", "-c", 'echo "$#"', "sh", *["x" * 100] * 5000]
    failure, output, _ = run(*arguments)
    assert (failure, output) == (None, b"5000\n")
    failure, _, status = run("/bin/true", *["x" * 100_000] * 30)
    assert failure == {"step": "execute", "errno": errno.E2BIG, "detail": "/bin/true"}
    assert status == 127


def test_search_follows_path_in_order(run: Run, tmp_path: Path) -> None:
    for name, text in (("a", ""), ("b", "#!/bin/sh\necho b\n"), ("c", "#!/bin/sh\necho c\n")):
        (tmp_path / name).mkdir()
        if text:
            (tmp_path / name / "tool").write_text(text)
            (tmp_path / name / "tool").chmod(0o755)
    path = f"/nowhere:{tmp_path / 'a'}:{tmp_path / 'b'}:{tmp_path / 'c'}"
    assert run("tool", PATH=path)[:2] == (None, b"b\n")
    (tmp_path / "b" / "tool").chmod(0o644)  # may not be executed: the next one is
    assert run("tool", PATH=path)[:2] == (None, b"c\n")
    (tmp_path / "c" / "tool").unlink()
    failure, _, status = run("tool", PATH=path)
    refused = {"step": "execute", "errno": errno.EACCES, "detail": str(tmp_path / "b" / "tool")}
    assert (failure, status) == (refused, 127)


@pytest.mark.parametrize("name", ["nosuch", "/nosuch", "/etc/passwd/x", "", "x" * 300])
def test_missing_program_is_told_of(run: Run, name: str) -> None:
    failure, _, status = run(name or "./", PATH="/bin:/usr/bin")
    assert failure is not None
    assert failure["step"] == "execute"
    assert failure["errno"] in (errno.ENOENT, errno.ENOTDIR, errno.EACCES)
    assert status == 127


def test_missing_interpreter_is_told_apart(run: Run, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/nosuch\n")
    script.chmod(0o755)
    failure, _, _ = run(str(script))
    detail = f"{script} (its interpreter)"
    assert failure == {"step": "execute", "errno": errno.ENOENT, "detail": detail}


def test_what_is_no_program_is_told_of(run: Run, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.write_bytes(b"\0" * 100)
    data.chmod(0o755)
    failure, _, _ = run("data", PATH=f"{tmp_path}:/bin")
    assert failure == {"step": "execute", "errno": errno.ENOEXEC, "detail": str(data)}


def test_missing_directory_is_told_of(run: Run) -> None:
    failure, _, status = run("/bin/true", cwd="/nosuch")
    assert failure == {"step": "change-directory", "errno": errno.ENOENT, "detail": "/nosuch"}
    assert status == 127


def test_end_of_the_launcher_is_its_end(run: Run) -> None:
    assert run("/bin/echo", "x", word=b"") == (None, b"", 127)


def test_without_its_descriptors_it_does_nothing() -> None:
    program = trampoline.open_program()
    try:
        done = subprocess.run(
            [f"/proc/self/fd/{program}"], pass_fds=[program], capture_output=True, check=False
        )
    finally:
        os.close(program)
    # Descriptor 3 may be the program itself, which is sealed: it is not written to either.
    assert (done.returncode, done.stdout, done.stderr) == (127, b"", b"")


def test_program_in_memory_cannot_be_changed() -> None:
    program = trampoline.open_program()
    try:
        with pytest.raises(PermissionError):
            os.pwrite(program, b"x", 200)
        with pytest.raises(PermissionError):
            os.truncate(program, 0)
    finally:
        os.close(program)


@pytest.mark.parametrize(("machine", "prefix"), [("x86_64", ""), ("aarch64", "aarch64-linux-gnu-")])
def test_bytes_are_what_the_assembler_makes_of_the_source(
    machine: str, prefix: str, tmp_path: Path
) -> None:
    if machine == os.uname().machine:
        prefix = ""
    elif not prefix:
        pytest.skip("needs an assembler for x86-64")
    if shutil.which(f"{prefix}as") is None:
        pytest.skip(f"needs {prefix}as (binutils)")
    made, code = tmp_path / "made.o", tmp_path / "code"
    source = SOURCES / f"trampoline_{machine}.S"
    subprocess.run([f"{prefix}as", "-o", made, source], check=True)
    subprocess.run([f"{prefix}objcopy", "-O", "binary", "-j", ".text", made, code], check=True)
    assert trampoline.program(machine).endswith(code.read_bytes())


def test_order_beyond_the_image_is_refused_by_name() -> None:
    variables = tuple((f"V{number}", "x" * 100_000) for number in range(170))
    with pytest.raises(TooLarge) as refused:
        trampoline.exec_image(ChangeDirectory("/"), Execute(("true",), variables))
    assert refused.value.data["step"] == "execute"


@examples(max_examples=100)
@given(st.binary(max_size=32))
def test_no_word_of_a_broken_trampoline_breaks_the_launcher(packet: bytes) -> None:
    exec_image = trampoline.ExecImage(b"", "/", "true", ("/bin/true",))
    try:
        told = trampoline.failure_from(b"t" + packet, exec_image)
    except ProtocolError:
        return
    assert told["step"] in trampoline.STEPS


@examples(max_examples=100)
@given(texts, st.lists(texts, min_size=1), st.dictionaries(texts, texts))
def test_image_holds_each_text_where_its_pointer_says(
    directory: str, arguments: list[str], environment: dict[str, str]
) -> None:
    exec_image = trampoline.exec_image(
        ChangeDirectory(directory), Execute(tuple(arguments), tuple(environment.items()))
    )
    image = exec_image.image

    def word(at: int) -> int:
        return int.from_bytes(image[at : at + 8], "little")

    def text(address: int) -> str:
        start = address - trampoline.IMAGE
        return image[start : image.index(b"\0", start)].decode()

    def vector(at: int) -> list[str]:
        found = []
        while word(at):
            found.append(text(word(at)))
            at += 8
        return found

    assert text(word(0)) == directory
    assert vector(word(8) - trampoline.IMAGE) == arguments
    assert vector(word(16) - trampoline.IMAGE) == [f"{k}={v}" for k, v in environment.items()]
    assert word(24) == len(exec_image.paths)
    assert [text(word(32 + 8 * index)) for index in range(word(24))] == list(exec_image.paths)
