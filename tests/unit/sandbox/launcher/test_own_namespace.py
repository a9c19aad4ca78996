"""Which ids an ordinary user's jobs get: subuid(5) read, and shared out between jobs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import jobworker
from jobworker.sandbox.launcher.own_namespace import (
    MIN_IDS_PER_JOB,
    SINGLE_ID,
    SubidRange,
    granted,
    split,
)
from jobworker.sandbox.user_namespaces import IDS_PER_JOB, Ids

SUBUID = "alice:100000:65536\nbob:165536:1000\n1003:200000:70000\nbob:300000:65536\n"


@pytest.mark.parametrize(
    ("user", "uid", "found"),
    [
        ("alice", 1001, SubidRange(100_000, 65_536)),
        ("bob", 1002, SubidRange(300_000, 65_536)),
        ("carol", 1003, SubidRange(200_000, 70_000)),
        ("", 1003, SubidRange(200_000, 70_000)),
        ("dora", 1004, None),
        ("", 1004, None),
    ],
)
def test_largest_range_by_name_or_number(user: str, uid: int, found: SubidRange | None) -> None:
    assert granted(SUBUID, user, uid) == found


@pytest.mark.parametrize("text", ["", "alice", "alice:x:y\n", "alice:1:2:3\n", "alice:-5:10", "::"])
def test_malformed_lines_give_nothing(text: str) -> None:
    assert granted(text, "alice", 1001) is None


@given(st.integers(0, 1 << 20), st.integers(1, 4000))
def test_jobs_never_share_ids_where_there_are_enough(length: int, jobs: int) -> None:
    ids = split(length, jobs)
    if ids is SINGLE_ID:
        assert length // jobs < MIN_IDS_PER_JOB
        assert ids.gaps
        return
    assert MIN_IDS_PER_JOB <= ids.each <= IDS_PER_JOB
    ends = [ids.first_of(index) + ids.each - 1 for index in range(jobs)]
    assert ids.first_of(0) == 1
    assert ends[-1] <= length
    assert all(ids.first_of(index) == ends[index - 1] + 1 for index in range(1, jobs))


def test_a_single_id_is_the_same_for_all() -> None:
    assert {SINGLE_ID.first_of(index) for index in range(9)} == {0}
    assert Ids(100).first_of(2) == 100 + 2 * IDS_PER_JOB


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become an ordinary user")
def test_ordinary_user_becomes_root_of_a_namespace_with_one_id() -> None:
    source = str(Path(jobworker.__file__).parent.parent)
    body = (
        f"import os, sys; sys.path.insert(0, {source!r})\n"
        "from jobworker.sandbox import syscalls as sc\n"
        "from jobworker.sandbox.launcher import own_namespace\n"
        "os.setgroups([]); os.setresgid(54321, 54321, 54321); os.setresuid(54321, 54321, 54321)\n"
        "sc.prctl(sc.PR_SET_DUMPABLE, 1)  # as if it had been started as that user\n"
        "print(own_namespace.become_root(), os.getresuid(), os.getresgid(), end=' ')\n"
        "print(*open('/proc/self/uid_map').read().split())"
    )
    command = [sys.executable, "-I", "-S", "-B", "-c", body]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "0 (0, 0, 0) (0, 0, 0) 0 54321 1\n"
