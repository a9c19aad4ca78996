"""Summaries are small whatever the job is, say what they leave out, and are their own summaries."""

import pytest
from attrs import evolve
from hypothesis import given

from jobworker.model.job import JobRecord, JobSpec
from jobworker.model.summary import MAX_COMMAND, summarize, whole, without_bulk
from jobworker.model.volumes import VolumeMount
from jobworker.serialization.convert import structure, unstructure
from jobworker.serialization.json_text import dumps

from ..strategies import examples, record, records

MANY = {f"VARIABLE_{n}": "x" * 20 for n in range(45_000)}


@examples(max_examples=200)
@given(records)
def test_summary_and_request_give_the_record_back(stored: JobRecord) -> None:
    summary = summarize(stored)
    assert summarize(summary) == summary
    assert whole(summary, stored.spec) == stored
    assert structure(JobRecord, unstructure(summary)) == summary
    changed = {
        part
        for part in summary.abridged
        if getattr(summary.spec, part) != getattr(stored.spec, part)
    }
    assert changed == set(summary.abridged)
    others = {part: getattr(stored.spec, part) for part in summary.abridged}
    assert evolve(summary.spec, **others) == stored.spec


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        (JobSpec(command=("x" * 131_071,)), "command"),
        (JobSpec(command=("é" * 60_000,) * 8), "command"),
        (JobSpec(command=("true", *("x" * 16_383))), "command"),
        (JobSpec(command=("true", *([""] * 16_383))), "command"),
        (JobSpec(command=("a" * (MAX_COMMAND - 3), "b", "c")), "command"),
        (JobSpec(command=("true",), environment=MANY), "environment"),
        (JobSpec(command=("true",), secret_environment={"A": "***"}), "secret_environment"),
        (JobSpec(command=("true",), workdir="/" + "w" * 131_000), "workdir"),
        (JobSpec(command=("true",), labels={f"l{n}": "v" * 255 for n in range(64)}), "labels"),
        (
            JobSpec(
                command=("true",),
                volumes=tuple(
                    VolumeMount(name=f"v{n}", path=f"/volumes/{n}" + "/p" * 400) for n in range(2)
                ),
            ),
            "volumes",
        ),
    ],
)
def test_what_is_long_is_cut_and_named(spec: JobSpec, part: str) -> None:
    stored = record(1, spec=spec, detail="d" * 100_000)
    summary = summarize(stored)
    assert summary.abridged == (part,)
    assert len(dumps(unstructure(summary))) < 12_000
    assert summarize(summary) == summary
    assert whole(summary, spec).spec == spec


def test_cut_command_begins_as_the_whole_one_and_ends_with_an_ellipsis() -> None:
    command = ("sh", "-c", "echo " + "x" * 5000, "more")
    cut = summarize(record(1, spec=JobSpec(command=command))).spec.command
    assert cut[:2] == ("sh", "-c")
    assert cut[2].startswith("echo xxx")
    assert cut[2].endswith("x…")
    assert len(cut) == 3
    assert sum(len(each) + 1 for each in cut) <= MAX_COMMAND


def test_detail_that_is_no_text_can_be_stored_all_the_same() -> None:
    detail = summarize(record(1, detail="no file " + "\udcff" * 4000)).detail
    assert detail.startswith("no file \\udcff")
    assert len(detail.encode()) <= 4096
    assert summarize(record(1, detail=detail)).detail == detail


def test_short_record_is_its_own_summary() -> None:
    stored = record(1, spec=JobSpec(command=("a",) * 1024, labels={"a": "b"}, name="n"))
    assert summarize(stored) is stored


LARGE: dict[str, dict[str, object]] = {
    "environment": {"environment": {f"V{n}": "x" for n in range(5000)}},
    "secrets": {"secret_environment": {"S": "x" * 5000}},
    "command": {"command": ("echo", *("x" for _ in range(3000)))},
    "workdir": {"workdir": "/" + "x" * 5000},
    "volumes": {
        "volumes": tuple(VolumeMount(name=f"v{n}", path=f"/{'x' * 400}/{n}") for n in range(12))
    },
}


@pytest.mark.parametrize("part", LARGE)
def test_record_in_memory_is_short_and_says_what_is_left_out(part: str) -> None:
    labels = {f"name{n}": "x" * 250 for n in range(20)}
    spec = JobSpec(**{"command": ("true",), "labels": labels, **LARGE[part]})  # type: ignore[arg-type]
    short = without_bulk(record(1, spec=spec))
    assert short.abridged
    assert short.spec.labels == labels
    assert len(dumps(unstructure(short.spec))) < len(dumps(unstructure(spec))) - 2000
    assert without_bulk(short) == short
    assert summarize(short) == summarize(record(1, spec=spec))


def test_small_record_stays_whole_in_memory() -> None:
    whole_record = record(1, spec=JobSpec(command=("true",), environment={"A": "b"}))
    assert without_bulk(whole_record) is whole_record
