"""What properties are tried with: jobs and their records, and plain values of every kind."""

from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial

from attrs import fields_dict
from hypothesis import settings
from hypothesis import strategies as st

from jobworker.model.job import (
    MAX_CPU_PERCENT,
    MAX_ID,
    MAX_IO_BPS,
    MAX_MEMORY_BYTES,
    MAX_PROCESSES,
    MAX_TIMEOUT_SECONDS,
    MIN_IO_BPS,
    JobId,
    JobRecord,
    JobSpec,
    JobStatus,
    Limits,
    OutputCut,
    Usage,
)
from jobworker.model.lifecycle import Reason, State
from jobworker.model.volumes import VolumeMount
from jobworker.storage import MAX_DISK_BYTES, MIN_DISK_BYTES, MIN_MEMORY_BYTES, NAME_PATTERN

examples = partial(settings, derandomize=True, deadline=None, database=None)
"""Settings of a property: the same examples in every run, however slow the machine."""

any_text = st.text(st.characters(exclude_categories=()), max_size=30)
"""Text with NUL, control characters and lone surrogates."""
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)
"""Text that an argument can hold."""
names = st.text(st.characters(categories=("L", "N", "P", "S")), max_size=30)
integers = st.integers(min_value=-(1 << 70), max_value=1 << 70)
counts = st.integers(min_value=0, max_value=1 << 62)
ids = st.integers(min_value=1, max_value=1 << 62).map(JobId)
times = st.datetimes(timezones=st.just(UTC))
variables = st.dictionaries(st.from_regex(r"[A-Za-z_][A-Za-z0-9_]*", fullmatch=True), texts)
labels = st.dictionaries(
    st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._/-]{0,20}[A-Za-z0-9])?", fullmatch=True),
    names,
    max_size=4,
)
seconds = st.floats(min_value=0, max_value=MAX_TIMEOUT_SECONDS)


def _optional_limit(low: int, high: int) -> st.SearchStrategy[int | None]:
    return st.none() | st.just(0) | st.integers(min_value=low, max_value=high)


disk_sizes = st.integers(MIN_DISK_BYTES, MAX_DISK_BYTES)
volume_names = st.from_regex(NAME_PATTERN, fullmatch=True)
mounts = st.lists(
    st.builds(VolumeMount, name=volume_names), max_size=2, unique_by=lambda mount: mount.name
).map(tuple)

limits = st.builds(
    Limits,
    cpu_percent=_optional_limit(1, MAX_CPU_PERCENT),
    memory_bytes=_optional_limit(MIN_MEMORY_BYTES, MAX_MEMORY_BYTES),
    io_bps=_optional_limit(MIN_IO_BPS, MAX_IO_BPS),
    processes=_optional_limit(1, MAX_PROCESSES),
    disk_bytes=st.none() | disk_sizes,
    output_bytes=_optional_limit(1, 1 << 60),
)

specs = st.builds(
    JobSpec,
    command=st.lists(texts, min_size=1, max_size=4).map(tuple).filter(lambda words: words[0] != ""),
    environment=variables,
    workdir=st.just("") | texts.map(lambda text: f"/{text}"),
    name=names,
    limits=limits,
    timeout_seconds=st.none() | seconds,
    secret_environment=variables,
    network=st.sampled_from(["host", "none", "private"]),
    runtime=st.just("") | volume_names,
    volumes=mounts,
    uid=st.integers(0, MAX_ID),
    gid=st.none() | st.integers(0, MAX_ID),
    init=st.booleans(),
    cpu_cores=st.sampled_from(["", "0", "0-3,5"]),
    labels=labels,
    at_max_output=st.none() | st.sampled_from(["discard-output", "stop"]),
)

records = st.builds(
    JobRecord,
    id=ids,
    spec=specs,
    owner=texts,
    state=st.sampled_from(State),
    created_at=times,
    started_at=st.none() | times,
    ended_at=st.none() | times,
    reason=st.none() | st.sampled_from(Reason),
    exit_code=st.none() | st.integers(0, 255),
    signal=st.none() | st.integers(1, 64),
    detail=texts,
    usage=st.none() | st.builds(Usage, cpu_ns=counts, memory_peak_bytes=counts),
    stdout_bytes=counts,
    stderr_bytes=counts,
    discarded_bytes=counts,
    output_cut=st.none() | st.sampled_from(OutputCut),
    output_removed_at=st.none() | times,
)

statuses = st.builds(
    lambda record, warnings: JobStatus(
        **{name: getattr(record, name) for name in fields_dict(JobRecord)}, warnings=warnings
    ),
    records,
    st.lists(texts, max_size=2).map(tuple),
)

plain_values: st.SearchStrategy[object] = st.recursive(
    st.none() | st.booleans() | integers | st.floats() | any_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(any_text, inner, max_size=4),
    max_leaves=12,
)
"""What a JSON parser may come back with, and more: NaN and the infinities too."""


def objects_with(keys: Mapping[str, object] | list[str]) -> st.SearchStrategy[dict[str, object]]:
    """Objects that often have some of `keys`, with values of any kind."""
    return st.dictionaries(st.sampled_from(sorted(keys)) | any_text, plain_values, max_size=6)


def record(id_: int, state: State = State.COMPLETED, **fields: object) -> JobRecord:
    """A plain record, for examples."""
    made = {"spec": JobSpec(command=("true",)), "owner": "alice", **fields}
    return JobRecord(
        id=JobId(id_),
        state=state,
        created_at=datetime(2026, 1, 31, 12, tzinfo=UTC),
        **made,  # type: ignore[arg-type]
    )
