"""The settings: documented at their defaults, and every fault of a file told at once."""

import contextlib
import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker.config import settings as config
from jobworker.config.roles import RoleSettings
from jobworker.config.settings import Settings, load
from jobworker.errors import ConfigError

from ..strategies import any_text, examples

DOCUMENTED = Path(__file__).resolve().parents[3] / "etc" / "worker.toml"


def keys_of_the_code() -> Iterator[tuple[str, str]]:
    for section in attrs.fields(Settings):
        assert section.type is not None
        if section.name in (
            "roles",
            "runtimes",
        ):  # tables by names of the reader's own; see the example's test
            continue
        for key in attrs.fields(section.type):
            yield section.name, key.name


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "worker.toml"
    path.write_text(text, encoding="utf-8")
    return path


def faults_of_file(tmp_path: Path, text: str) -> list[str]:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(path) in caught.value.message
    assert caught.value.remedy
    faults = caught.value.data["faults"]
    assert isinstance(faults, list)
    assert all(fault in caught.value.message for fault in faults)
    return faults


# --- the documented file --------------------------------------------------------------------


def test_documented_file_is_the_defaults() -> None:
    assert load(DOCUMENTED) == Settings()


def test_documented_file_names_every_key_once_and_no_other() -> None:
    data = tomllib.loads(DOCUMENTED.read_text(encoding="utf-8"))
    written = [(section, key) for section, keys in data.items() for key in keys]
    assert sorted(written) == sorted(keys_of_the_code())


def test_documented_file_explains_every_key() -> None:
    explained, in_explained_group = set(), False
    for line in DOCUMENTED.read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("["):
            in_explained_group = False
        elif line.startswith("#"):
            in_explained_group = len(line) > 10
        elif (key := re.match(r"(\w+) = ", line)) and (in_explained_group or "# " in line):
            explained.add(key[1])
    assert {key for _, key in keys_of_the_code()} - explained == set()


def test_documented_role_is_one_that_can_be_had(tmp_path: Path) -> None:
    lines = DOCUMENTED.read_text(encoding="utf-8").splitlines()
    begin = lines.index("# [roles.tenant]")
    example = "\n".join(line.removeprefix("# ") for line in lines[begin : begin + 20] if line)
    (name, role), *others = load(write(tmp_path, example)).roles.items()
    assert (name, others) == ("tenant", [])
    given = tomllib.loads(example)["roles"]["tenant"]
    assert sorted(given) == sorted(field.name for field in attrs.fields(RoleSettings))
    assert role.quota.memory_bytes == given["max_memory"] << 20


def test_documented_runtime_is_one_that_can_be_had(tmp_path: Path) -> None:
    lines = DOCUMENTED.read_text(encoding="utf-8").splitlines()
    begin = lines.index("# [runtimes.bookworm]")
    example = "\n".join(line.removeprefix("# ") for line in lines[begin : begin + 2])
    runtimes = load(write(tmp_path, example)).runtimes
    assert {name: attrs.asdict(found) for name, found in runtimes.items()} == (
        tomllib.loads(example)["runtimes"]
    )


@pytest.mark.parametrize(
    ("name", "path", "words"),
    [
        ("a/b", "/srv/x", "is no name"),
        ("-x", "/srv/x", "is no name"),
        ("x", "srv/x", "absolute path"),
        ("x", "/", "absolute path"),
        ("x", "/srv/../etc", "absolute path"),
    ],
)
def test_runtime_without_a_name_or_path_is_refused(
    tmp_path: Path, name: str, path: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        load(write(tmp_path, f'[runtimes."{name}"]\npath = "{path}"\n'))


def test_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load(write(tmp_path, "")) == Settings()


# --- reading --------------------------------------------------------------------------------


def test_values_are_taken_in_their_units(tmp_path: Path) -> None:
    settings = load(
        write(
            tmp_path,
            "[worker]\ndefault_cpu_limit = 50\ndefault_memory_limit = 4\n"
            "default_io_limit = 4096\ndefault_process_limit = 7\n"
            '[cgroup]\nenable_controllers = ["pids", "io", "memory", "cpu"]\n',
        )
    )
    limits = settings.worker.default_limits
    assert (limits.cpu_percent, limits.memory_bytes) == (50, 4 << 20)
    assert (limits.io_bps, limits.processes) == (4096, 7)


def test_relative_certificates_are_taken_from_the_directory_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "conf").mkdir()
    monkeypatch.chdir(tmp_path)
    text = '[security]\nca_cert = "ca.pem"\nserver_key = "/keys/key.pem"\n'
    write(tmp_path / "conf", text)
    security = load(Path("conf/worker.toml")).security
    assert security.ca_cert == str(tmp_path / "conf" / "ca.pem")
    assert security.server_key == "/keys/key.pem"


def test_all_faults_are_told_at_once_with_their_keys(tmp_path: Path) -> None:
    told = faults_of_file(
        tmp_path,
        '[server]\nport = "50051"\nadress = "::"\n'
        "[worker]\nmax_concurrent_jobs = 0\ndefault_cpu_limit = true\n"
        'job_timeout = "soon"\nstate_dir = "relative"\n'
        '[security]\nmin_tls_version = "1.1"\n'
        '[cgroup]\nenable_controllers = ["cpu", "net"]\n'
        '[sandbox]\nprograms = ["/"]\netc = ["../shadow"]\n'
        '[logging]\nlevel = "LOUD"\n[extra]\n',
    )
    assert {fault.split(":")[0] for fault in told} == {
        *("server.port", "server", "worker.max_concurrent_jobs", "worker.default_cpu_limit"),
        *("worker.job_timeout", "worker.state_dir", "security.min_tls_version"),
        *("cgroup.enable_controllers[1]", "sandbox.programs", "sandbox.etc", "logging.level"),
        "unknown key 'extra'",
    }


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[server]\nport = 65536", "server.port: must be from 0 to 65535, not 65536"),
        ("[server]\nport = 1.0", "server.port: must be an integer, not a number"),
        ("[server]\nport = 2026-01-31", "server.port: must be an integer, not date"),
        ('[server]\naddress = ""', "server.address: must be an address to listen on"),
        ('[server]\naddress = "a b"', "server.address: must be an address to listen on"),
        ("server = 1", "server: must be an object, not an integer"),
        ("[[server]]", "server: must be an object, not a list"),
        ("[worker]\ndefault_memory_limit = 3", "must be 0 (no limit) or from 4"),
        ('[worker]\nstate_dir = "/a/../b"', "must be an absolute path without '..'"),
        ('[worker]\nstate_dir = "/a\\u0000"', "must be an absolute path without '..'"),
        ('[worker]\nstop_grace = "4000d"', "is longer than ten years"),
        ('[security]\nca_cert = ""', "security.ca_cert: must be the path of a file"),
        ('[security]\nserver_key = "a\\u0000"', "security.server_key: must be the path of a file"),
        ('[cgroup]\nparent = "a/../../b"', "cgroup.parent: must be a path below"),
        ('[cgroup]\nenable_controllers = "cpu"', "must be a list, not a string"),
        ('[sandbox]\nprograms = ["usr"]', "sandbox.programs: must be an absolute path"),
        ('[sandbox]\nprograms = ["/proc"]', "sandbox.programs: must not be '/proc': /proc has no"),
        ('[sandbox]\nprograms = ["//sys/"]', "sandbox.programs: must not be '//sys/': /sys has"),
        ('[sandbox]\nprograms = ["/dev/shm"]', "sandbox.programs: must not be '/dev/shm'"),
        ('[sandbox]\netc = ["/etc/shadow"]', "sandbox.etc: must contain names below /etc"),
        ('[sandbox]\netc = [""]', "sandbox.etc: must contain names below /etc"),
        ('[sandbox]\netc = ["a\\u0000"]', "sandbox.etc: must contain names below /etc"),
        ('[worker]\nuser = "a\\u0000"', "worker.user: must be a user's name or number"),
        (f'[worker]\nuser = "{"9" * 5000}"', "worker.user: must be a user's name or number"),
        ("[sandbox]\nfirst_uid = 1", "sandbox.first_uid: must be from 100000"),
        ("[sandbox]\nfirst_uid = 4200000000\n[worker]\nmax_concurrent_jobs = 4000", "no room"),
        ("[sandbox]\nspares = -1", "sandbox.spares: must be from 0 to 64"),
        ("[roles.Tenant]\noperations = []", "roles: 'Tenant' is not a name for a role"),
        ("[roles.admin]\noperations = []", "roles: 'admin' is built in"),
        ("[roles.x]", "roles['x'].operations: is missing"),
        ('[roles.x]\noperations = "view"', "roles['x'].operations: must be a list"),
        (
            '[roles.x]\noperations = ["fly"]',
            "must be one of run, stop, remove, view, log, volumes, unbounded",
        ),
        ('[roles.x]\noperations = []\nscope = "mine"', "must be one of all, own"),
        ('[roles.x]\noperations = ["volumes"]', "roles['x'].scope: must be 'all' if 'volumes'"),
        ("[roles.x]\noperations = []\nmax_jobs = -1", "max_jobs: must be from 0"),
    ],
)
def test_bad_value_is_refused(tmp_path: Path, text: str, told: str) -> None:
    assert [fault for fault in faults_of_file(tmp_path, text) if told in fault]


@pytest.mark.parametrize("controller", config.CONTROLLERS)
def test_default_limit_needs_its_controller(tmp_path: Path, controller: str) -> None:
    key = {"cpu": "cpu", "memory": "memory", "io": "io", "pids": "process"}[controller]
    rest = ", ".join(repr(other) for other in config.CONTROLLERS if other != controller)
    text = f"[cgroup]\nenable_controllers = [{rest}]\n[worker]\n"
    told = faults_of_file(tmp_path, f"{text}default_{key}_limit = 5000\n")
    assert len(told) == 1
    assert f"worker.default_{key}_limit: needs {controller!r}" in told[0]
    load(write(tmp_path, f"{text}default_{key}_limit = 0\n"))


def test_keys_and_state_where_jobs_could_read_them_are_refused(tmp_path: Path) -> None:
    (tmp_path / "shown" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("shown/deep")
    for shown in (f"{tmp_path}/shown", f"{tmp_path}/shown/", f"/{tmp_path}//shown"):
        for below in ("shown", "shown/deep/x", "./shown//x", "link/x"):
            told = faults_of_file(
                tmp_path,
                f'[sandbox]\nprograms = ["/usr", "{shown}"]\n'
                f'[worker]\nstate_dir = "{tmp_path}/{below}"\n'
                f'[security]\nserver_key = "{below}"\n',
            )
            assert [fault.split(":")[0] for fault in told] == [
                *("worker.state_dir", "security.server_key")
            ]


def test_name_that_only_begins_like_a_program_directory_is_no_fault(tmp_path: Path) -> None:
    load(write(tmp_path, '[worker]\nstate_dir = "/usrdata"\n'))


def test_missing_file_and_directory_are_refused_with_a_remedy(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "x.toml", "No such file"), (tmp_path, "it is a directory")):
        with pytest.raises(ConfigError, match=reason) as caught:
            load(path)
        assert "--config" in caught.value.remedy


@pytest.mark.parametrize("content", [b"[server\n", b"port = \n", b"a = 1\na = 2\n", b"[s]\n[s]\n"])
def test_file_that_is_no_toml_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "worker.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="it is not TOML"):
        load(path)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\xff\xfe", "it is not UTF-8 text"),
        (b"\xef\xbb\xbf[server]\nport = 1\n", "it begins with a byte order mark"),
        (b"a = " + b"[" * 20_000, "its values are nested too deeply"),
        (b"#" * (1 << 20) + b"\n", "it is larger than 1048576 bytes"),
    ],
)
def test_file_that_is_no_text_of_usual_form_is_refused(
    tmp_path: Path, content: bytes, why: str
) -> None:
    path = tmp_path / "worker.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=why):
        load(path)


def test_fifo_is_refused_at_once(tmp_path: Path) -> None:
    """At SIGHUP, too, nothing would end the wait for its other end."""
    os.mkfifo(tmp_path / "worker.toml")
    with pytest.raises(ConfigError, match="it is not a regular file"):
        load(tmp_path / "worker.toml")


values = st.recursive(
    st.booleans() | st.integers() | st.floats() | any_text,
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)


def toml(value: object) -> str:
    if isinstance(value, str):
        text = "".join(
            character if character.isalnum() else f"\\U{ord(character):08x}"
            for character in value.encode("utf-8", "replace").decode()
        )
        return f'"{text}"'
    if isinstance(value, list):
        return "[" + ", ".join(toml(item) for item in value) + "]"
    return str(value).lower()


@examples(max_examples=200)
@given(st.dictionaries(st.sampled_from(sorted(keys_of_the_code())), values, max_size=4))
def test_no_value_raises_anything_but_config_error(
    tmp_path_factory: pytest.TempPathFactory, wanted: dict[tuple[str, str], object]
) -> None:
    lines = [f"{section}.{key} = {toml(value)}" for (section, key), value in wanted.items()]
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    tomllib.loads(path.read_text(encoding="utf-8"))  # the test's own text is sound
    with contextlib.suppress(ConfigError):
        load(path)
