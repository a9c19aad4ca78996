"""Take one defence away at a time, run the attacks, and see that one of them is no longer refused.

    make mutants                       all of them; prints the table of docs/threat-model.md
    python -m tests.security.mutants WORD…   those whose name contains a word

A mutant is a copy of the source tree in which one text is replaced by another: a step of the plan,
a rule of the filter, a mask, a capability. The service that the tests start is then the one of the
copy (PYTHONPATH). Nothing of this can be switched on in the product. A mutant that no test notices
"survives": either a test is missing, or the defence is one of several and the table says so.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PLAN, APPLY = "src/jobworker/sandbox/start/plan.py", "src/jobworker/sandbox/start/apply.py"
MAKING, FILTER = "src/jobworker/sandbox/launcher/child_maker.py", "etc/seccomp.toml"
BPF = "src/jobworker/sandbox/seccomp/program.py"
SECONDS = 240


class Mutant(NamedTuple):
    """What is taken away, where, and how."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = ("attempts", "privilege", "leaks", "masks")
    """Those that are to notice; the slow ones only where nothing else can."""
    beside: tuple[tuple[str, str, str], ...] = ()
    """What else is taken away, for a defence that another one makes superfluous: like the first."""


def step(name: str, text: str, *tests: str) -> Mutant:
    """A step of the plan that is left out."""
    mutant = Mutant(f"step {name}", PLAN, text, "")
    return mutant._replace(tests=tests) if tests else mutant


STEPS = (
    step("attach-scope", "        s.AttachScope(),\n", "abuse"),
    step("scope-sockets-and-signals", "        s.ScopeSocketsAndSignals(),\n"),
    step("unshare-cgroup-namespace", "        s.UnshareCgroupNamespace(),\n"),
    step("new-session", "        s.NewSession(),\n"),
    step("new-keyring", "        s.NewKeyring(),\n"),
    step("enter-user-namespace", "        s.EnterUserNamespace(leave_groups=slot.ids > 1),\n"),
    step("drop-capabilities", "        s.DropCapabilities(KEPT_CAPABILITIES),\n"),
    step("forbid-new-privileges", "        s.ForbidNewPrivileges(),\n"),
    step("set-oom-score", "        s.SetOomScore(0),\n"),
    step("die-with-launcher", "        s.DieWithLauncher(),\n", "endings"),
    step("reset-signals", "        s.ResetSignals(),\n"),
    step("filter-system-calls", "        s.FilterSystemCalls(),\n"),
    step("mask-path (all)", "        *(s.MaskPath(root + path) for path in MASKED),\n"),
    step("read-only-path (all)", "        *(s.ReadOnlyPath(root + path) for path in READ_ONLY),\n"),
    step("resource limits (all)", "        *RESOURCE_LIMITS,\n"),
)
LAUNCHERS_NO_NEW_PRIVILEGES = (
    "src/jobworker/sandbox/launcher/main.py",
    "    sc.prctl(sc.PR_SET_NO_NEW_PRIVS, 1)\n",
    "",
)
CLOSE = (
    "    os.close(USER_NAMESPACE_DESCRIPTOR)\n    sc.close_range(INIT_DESCRIPTOR + 1)\n",
    "    os.set_inheritable(USER_NAMESPACE_DESCRIPTOR, True)\n",
)
SETUID = ("_PRIVATE = sc.MS_NOSUID | sc.MS_NODEV", "_PRIVATE = 0")
NO_NEW_PRIVILEGES = (PLAN, "        s.ForbidNewPrivileges(),\n", "")
APPLIED = (
    Mutant("close-descriptors closes nothing", APPLY, *CLOSE),
    Mutant("keep-own-descriptors keeps others", APPLY, "    sc.close_range(len(own))\n", ""),
    Mutant(
        *("keep-own- and close-descriptors close nothing", APPLY, "    sc.close_range(len(own))\n"),
        "    os.dup2(0, 9, inheritable=True)\n",
        beside=((APPLY, *CLOSE),),
    ),
    Mutant(
        "no_new_privs neither here nor in the launcher",
        *NO_NEW_PRIVILEGES,
        beside=(LAUNCHERS_NO_NEW_PRIVILEGES,),
    ),
    Mutant("pivot-root keeps the old root", APPLY, '    sc.umount(".")\n', ""),
    Mutant("mounts allow setuid", APPLY, *SETUID),
    Mutant(
        "mounts allow setuid, without no_new_privs",
        *(APPLY, *SETUID),
        beside=(NO_NEW_PRIVILEGES, LAUNCHERS_NO_NEW_PRIVILEGES),
    ),
)
# Not the UTS namespace: without it the launcher would name the host itself.
NAMESPACES = (
    Mutant("no IPC namespace", MAKING, " | sc.CLONE_NEWIPC", ""),
    Mutant("no PID namespace", MAKING, "sc.CLONE_NEWPID | ", ""),
)
LIMITS = tuple(
    Mutant(f"no limit {name}", PLAN, f'    s.SetResourceLimit("RLIMIT_{name}", {limits}),\n', "")
    for name, limits in (
        *(("CORE", "0, 0"), ("NOFILE", "1024, 65_536"), ("MEMLOCK", "8 << 20, 8 << 20")),
        *(("MSGQUEUE", "819_200, 819_200"), ("NICE", "0, 0"), ("RTPRIO", "0, 0")),
    )
)


def list_of_plan(name: str) -> list[str]:
    """The paths in one of the plan's lists."""
    text = (ROOT / PLAN).read_text()
    body = re.search(rf"^{name} = \((.*?)\)$", text, re.M | re.S)
    assert body is not None
    return re.findall(r'"(/proc/[\w.-]+)"', body[1])


def masks() -> Iterator[Mutant]:
    """Each mask, of those that this kernel has something under, and each read-only path."""
    for path in list_of_plan("MASKED"):
        if os.path.isfile(path) or (os.path.isdir(path) and os.listdir(path)):
            yield Mutant(f"mask {path}", PLAN, f'    "{path}",\n', "")
    for path in list_of_plan("READ_ONLY"):
        if os.path.exists(path):
            yield Mutant(f"read-only {path}", PLAN, f'"{path}"', '"/proc/nosuch"')


def capabilities() -> Iterator[Mutant]:
    """Each capability that containers are known to be escaped by, given back."""
    for name, number in (
        *(("DAC_READ_SEARCH", 2), ("NET_ADMIN", 12), ("NET_RAW", 13), ("SYS_MODULE", 16)),
        *(("SYS_PTRACE", 19), ("SYS_ADMIN", 21), ("MKNOD", 27), ("SYS_RESOURCE", 24)),
    ):
        yield Mutant(
            f"capability {name} kept",
            PLAN,
            "KEPT_CAPABILITIES = frozenset(\n    {\n",
            f"KEPT_CAPABILITIES = frozenset(\n    {{\n        {number},\n",
        )


def rules() -> Iterator[Mutant]:
    """Each refusal of the filter turned into a permission, each condition taken out."""
    text = (ROOT / FILTER).read_text()
    for rule in re.findall(r"^\[\[refuse\]\]\n.*?(?=^\[\[|^# ---)", text, re.M | re.S):
        what = re.search(r'^what = "(.*)"$', rule, re.M)
        assert what is not None
        if "\nwhen = " in rule:
            yield Mutant(f"filter: no refusal of: {what[1]}", FILTER, rule, "")
            continue
        allowed = rule.replace("[[refuse]]", "[[allow]]")
        allowed = re.sub(r"^(error|quiet) = .*\n", "", allowed, flags=re.M)
        yield Mutant(f"filter: permission of: {what[1]}", FILTER, rule, allowed)
    for rule in re.findall(r"^\[\[allow\]\]\n.*?(?=^\[\[|^# ---)", text, re.M | re.S):
        what = re.search(r'^what = "(.*)"$', rule, re.M)
        assert what is not None
        if "\nwhen = " in rule:
            free = re.sub(r"^when = .*\n", "", rule, flags=re.M)
            yield Mutant(f"filter: no condition on: {what[1]}", FILTER, rule, free)


FILTER_WHOLE = (
    Mutant(
        "filter: unknown calls are not ENOSYS", FILTER, "newest_call = 469", "newest_call = 9999"
    ),
    Mutant("filter: denials are not logged", FILTER, "log = true", "log = false"),
    Mutant(
        "filter: without the quiet program", BPF, "    sc.seccomp(filters.quiet, log=False)\n", ""
    ),
    Mutant(
        "filter: other ABIs are let through",
        "src/jobworker/sandbox/seccomp/compile.py",
        "    foreign = error(errno.ENOSYS)\n",
        "    foreign = ALLOW\n",
    ),
)


def mutants() -> list[Mutant]:
    """All of them."""
    return [
        *STEPS,
        *APPLIED,
        *NAMESPACES,
        *LIMITS,
        *masks(),
        *capabilities(),
        *rules(),
        *FILTER_WHOLE,
    ]


HIDDEN = {
    "step forbid-new-privileges": "inherited from the launcher; see both taken away",
    "step set-oom-score": "only a launcher with CAP_SYS_RESOURCE has something to take back",
    "step die-with-launcher": "jobs die with the launcher's process namespace as well",
    "keep-own-descriptors keeps others": "closed by close-descriptors; see both taken away",
    "mounts allow setuid": "no_new_privs; see all taken away",
    **dict.fromkeys(
        (f"no limit {name}" for name in ("MEMLOCK", "MSGQUEUE", "NICE", "RTPRIO")),
        "the same as Linux gives by default",
    ),
    "filter: permission of: files by handle": "needs a capability over the host",
    "filter: permission of: namespaces of others": "needs a capability over the host",
}
"""Mutants that change nothing for a job, since another layer does the same: which one."""


class Result(NamedTuple):
    """What the tests made of a mutant: which one went red first, "" if none did."""

    mutant: Mutant
    noticed: str


def attack(mutant: Mutant) -> Result:
    """Run the attacks on a copy in which the mutant's text is replaced."""
    with tempfile.TemporaryDirectory(prefix="jobworker-mutant-", dir="/var/tmp") as directory:
        os.chmod(directory, 0o755)
        copy = Path(directory)
        for name in ("src", "etc", "tests", "pyproject.toml"):
            here, there = ROOT / name, copy / name
            if here.is_dir():
                shutil.copytree(here, there, symlinks=True)
            else:
                shutil.copy(here, there)
        for file, old, new in (mutant[1:4], *mutant.beside):
            text = (copy / file).read_text()
            assert old in text, f"{mutant.name}: {old!r} is not in {file}"
            (copy / file).write_text(text.replace(old, new, 1))
        return Result(mutant, first_red(copy, mutant.tests))


def first_red(copy: Path, names: Sequence[str]) -> str:
    """The test that goes red first in a copy of the source tree; "" also where none could run."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    tests = [
        f"tests/{name}.py" if "/" in name else f"tests/security/sandbox/test_{name}.py"
        for name in names
    ]
    try:
        done = subprocess.run(
            [*command, *tests],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy / "src")},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "(no end)"
    red = re.search(r"^(?:FAILED|ERROR) \S*?(\w+)\.py::(\S+)", done.stdout, re.M)
    if red is not None:
        return f"{red[1]}: {red[2]}"
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-2000:], sep="\n", file=sys.stderr)
    return ""


def main() -> int:
    """Try those that are named, or all; print the table, and 1 if one survives unexplained."""
    words = sys.argv[1:]
    chosen = [m for m in mutants() if not words or any(word in m.name for word in words)]
    began = time.monotonic()
    print("| taken away | first test that goes red |\n|---|---|", flush=True)
    results = []
    for mutant in chosen:
        result = attack(mutant)
        results.append(result)
        hidden = HIDDEN.get(mutant.name, "")
        noticed = f"`{result.noticed}`" if result.noticed else f"none: {hidden or '**missing**'}"
        print(f"| {mutant.name} | {noticed} |", flush=True)
    killed = sum(bool(result.noticed) for result in results)
    missing = [r for r in results if not r.noticed and r.mutant.name not in HIDDEN]
    minutes = (time.monotonic() - began) / 60
    print(f"\n{killed} of {len(results)} were noticed, in {minutes:.0f} minutes.")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
