"""Options of a job: its user, its labels, its secrets; over the wire and from the command line."""

import json
import os
from pathlib import Path

import pytest

from jobworker.cli.worker.embedded_service import EmbeddedService

from .test_cli import Cli, fails
from .wire import Refused, Wire


@pytest.fixture
def cli(service: EmbeddedService) -> Cli:
    return Cli(service)


async def test_job_runs_as_the_user_asked_for(admin: Wire) -> None:
    script = (
        "id -u; id -g; id -G; echo $HOME ${USER-none}; touch mine && stat -c %u:%g mine;"
        "grep -E '^Cap(Inh|Prm|Eff|Amb)' /proc/self/status | sort -u -k 2 | wc -l;"
        "chown 0 mine 2>&1 | grep -o 'not permitted'; cat /etc/passwd > /dev/null && echo read"
    )
    out, err, _ = await admin.run("sh", "-c", script, uid=1000, gid=2000)
    expected = "1000\n2000\n2000\n/workspace none\n1000:2000\n1\nnot permitted\nread\n"
    assert out == expected, err
    out, _, _ = await admin.run("sh", "-c", "id -u; id -g", uid=7)
    assert out == "7\n7\n"
    out, _, _ = await admin.run("sh", "-c", "id -u; id -g; touch mine && echo made", gid=5)
    assert out == "0\n5\nmade\n"


@pytest.mark.parametrize("spec", [{"uid": -1}, {"uid": 65_536}, {"gid": 65_536}, {"uid": "0"}])
async def test_user_beyond_the_range_is_refused_by_name(
    admin: Wire, spec: dict[str, object]
) -> None:
    with pytest.raises(Refused, match=f"job.{next(iter(spec))}: must be") as refused:
        await admin.run("true", **spec)
    assert refused.value.code == -32602


async def test_jobs_are_found_by_their_labels(admin: Wire) -> None:
    mine = {"team": "red", "suite/x": "ünï \"q\" '1'"}
    one = await admin.start("true", labels=mine)
    two = await admin.start("sleep", "60", labels={"team": "red"})
    other = await admin.start("true", labels={"team": "blue"})

    async def found(labels: dict[str, str]) -> set[object]:
        jobs = (await admin.call("job.list", labels=labels, limit=1000))["jobs"]
        assert isinstance(jobs, list)
        return {job["id"] for job in jobs} & {one, two, other}

    await admin.call("job.wait", id=one)
    assert await found({"team": "red"}) == {one, two}, "one has ended, the other one is alive"
    assert await found(mine) == {one}
    assert await found({"team": "red", "suite/x": "other"}) == set()
    assert await found({}) == {one, two, other}
    await admin.call("job.stop", id=two)
    assert await found({"team": "red"}) == {one, two}
    for bad in ({'a"]': "x"}, {"": "x"}, {"a": "\n"}):
        with pytest.raises(Refused, match="labels: "):
            await admin.call("job.list", labels=bad)
        with pytest.raises(Refused, match=r"job\.labels: "):
            await admin.start("true", labels=bad)


async def test_job_runs_on_the_cores_asked_for_and_cannot_leave_them(admin: Wire) -> None:
    allowed = sorted(os.sched_getaffinity(0))
    script = (
        "import os\n"
        "def now(): return sorted(os.sched_getaffinity(0))\n"
        "print(now())\n"
        "try: os.sched_setaffinity(0, range(1024))\n"
        "except OSError: pass\n"
        "print(now())\n"
    )
    out, err, _ = await admin.run("python3", "-c", script)
    assert out == f"{allowed}\n" * 2, err
    for core in {allowed[0], allowed[-1]}:
        out, err, job = await admin.run("python3", "-c", script, cpu_cores=str(core))
        assert out == f"[{core}]\n" * 2, err
        assert job["spec"]["cpu_cores"] == str(core)  # type: ignore[index]
    out, _, _ = await admin.run("python3", "-c", script)
    assert out == f"{allowed}\n" * 2, "a later job has them all"


@pytest.mark.parametrize("cores", ["x", "1-", "3-1", "0,,1", " 0", "8192", "-1", "0-1-2"])
async def test_cores_that_are_no_list_are_refused_by_name(admin: Wire, cores: str) -> None:
    with pytest.raises(Refused, match=r"job\.cpu_cores: must be a list of cores"):
        await admin.start("true", cpu_cores=cores)


def test_faults_of_cores_are_told_of_the_option(cli: Cli) -> None:
    fails(cli("run", "--cpu-cores", "0-", "true"), 65, "--cpu-cores: must be a list of cores")
    fails(cli("run", "--cpu-cores", "8191", "true"), 65, "--cpu-cores: this host has no core 8191")


async def test_core_that_does_not_exist_is_refused_by_name(admin: Wire) -> None:
    with pytest.raises(Refused, match="cpu_cores: this host has no core 8191") as refused:
        await admin.start("true", cpu_cores="0,8191")
    assert refused.value.code == -32602


async def test_secret_reaches_the_job_and_no_record(admin: Wire, service: EmbeddedService) -> None:
    secret = "c4nary-in-a-coal-mine"
    result = await admin.call(
        "job.run",
        job={
            "command": [
                "sh",
                "-c",
                'test "$TOKEN" = "$(cat /dev/stdin <<E\n$TOKEN\nE\n)"; sleep 60',
            ],
            "environment": {"OPEN": "seen"},
            "secret_environment": {"TOKEN": secret},
        },
    )
    number = result["job"]["id"]  # type: ignore[index]
    shown = [
        result,
        await admin.call("job.status", id=number),
        await admin.call("job.list", limit=1000),
        await admin.call("job.stop", id=number),
        await admin.call("job.status", id=number),
    ]
    for answer in shown:
        assert secret not in json.dumps(answer)
    assert shown[1]["spec"]["secret_environment"] == {"TOKEN": "***"}  # type: ignore[index]
    assert shown[1]["spec"]["environment"] == {"OPEN": "seen"}  # type: ignore[index]
    out, _, _ = await admin.run("printenv", "TOKEN", secret_environment={"TOKEN": secret})
    assert out == f"{secret}\n", "the control: the job has it"
    spool = service.directory / "state" / "service" / "spool"
    for file in service.directory.rglob("*"):
        if file.is_file() and spool not in file.parents:  # there the job told it itself
            assert secret.encode() not in file.read_bytes(), file


async def test_secret_that_is_no_variable_is_refused_without_its_value(admin: Wire) -> None:
    for bad in ({"1A": "hunter2"}, {"A": "hunter2\0"}, {"A": ["hunter2"]}):
        with pytest.raises(Refused, match=r"job\.secret_environment") as refused:
            await admin.start("true", secret_environment=bad)
        assert "hunter2" not in refused.value.message


def test_command_line_gives_all_of_them(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text("# mine\nA=from file\nB=from file\n")
    done = cli(
        *("run", "--env-file", str(file), "--env", "B=from option", "--secret-env", "TOKEN"),
        *("--secret-env=OTHER=x y", "--user=3:4", "--label", "team=red", "-l", "nightly", "-q"),
        *("sh", "-c", 'echo "$A|$B|$TOKEN|$OTHER|$(id -u):$(id -g)"'),
        TOKEN="hunter2",
    )
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()
    cli("wait", job)
    assert cli("log", job).stdout == "from file|from option|hunter2|x y|3:4\n"
    told = cli("status", job).stdout
    assert "Labels: team=red, nightly=\n" in told
    assert "Secrets: TOKEN, OTHER\n" in told
    assert "User: 3:4\n" in told
    assert "hunter2" not in told + cli("list", "--json").stdout
    listed = json.loads(cli("list", "--label", "nightly=", "--label=team=red", "--json").stdout)
    assert [record["id"] for record in listed] == [int(job)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--user", "root"], "'root' is not UID or UID:GID"),
        (["--label", "a b=c"], "'a b' is not a name for a label"),
        (["--secret-env", "NOT_SET_ANYWHERE"], "'NOT_SET_ANYWHERE' is not set here"),
        (["--env-file", "/nowhere"], "cannot read '/nowhere'"),
        (["--network", "bridge"], "'bridge' is not one of"),
    ],
)
def test_bad_value_is_a_usage_error(cli: Cli, options: list[str], words: str) -> None:
    fails(cli("run", *options, "true"), 2, words)
