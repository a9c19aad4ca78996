"""Parameters and results of every method, for properties."""

from hypothesis import strategies as st

from jobworker.model.job import Stream
from jobworker.model.lifecycle import State
from jobworker.model.volumes import Volume
from jobworker.protocol import messages as m
from jobworker.protocol.discovery import describe

from ..strategies import (
    counts,
    disk_sizes,
    ids,
    records,
    seconds,
    specs,
    statuses,
    texts,
    times,
    volume_names,
)

_numbers = st.integers(min_value=-(1 << 62), max_value=1 << 62)
_credit = st.integers(min_value=1, max_value=m.MAX_CREDIT_BYTES)
_nothing = st.just(m.Nothing())
_deliveries = st.builds(
    m.Delivery,
    encoding=st.sampled_from(m.Encoding),
    credit_bytes=st.none() | st.integers(min_value=0, max_value=m.MAX_CREDIT_BYTES),
)
_starts = st.lists(
    st.builds(
        m.StreamStart, stream=st.sampled_from(Stream), offset=counts, since=st.none() | times
    ),
    max_size=2,
).map(tuple)
_job = st.builds(m.JobParams, id=ids)

PARAMS: dict[str, st.SearchStrategy[object]] = {
    "service.hello": _nothing,
    "job.plan": st.builds(m.PlanParams, job=specs),
    "job.run": st.builds(m.RunParams, job=specs, follow=st.none() | _deliveries),
    "job.status": _job,
    "job.list": st.builds(
        m.ListParams,
        states=st.lists(st.sampled_from(State), max_size=3).map(tuple),
        limit=st.integers(1, m.MAX_LIST),
        before=st.none() | ids,
    ),
    "job.wait": _job,
    "job.stop": st.builds(m.StopParams, id=ids, signal=texts, grace_seconds=st.none() | seconds),
    "job.log": st.builds(
        m.LogParams,
        id=ids,
        follow=st.booleans(),
        offset=counts,
        tail_lines=st.none() | st.integers(0, m.MAX_TAIL_LINES),
        since=st.none() | times,
        since_seconds=st.none() | seconds,
        starts=_starts,
        streams=st.lists(st.sampled_from(Stream), max_size=2).map(tuple),
        coalesce=st.booleans(),
        delivery=_deliveries,
    ),
    "job.remove": st.builds(m.RemoveParams, id=ids, force=st.booleans()),
    "job.prune": st.builds(
        m.PruneParams,
        older_than_seconds=st.none() | seconds,
        keep_jobs=st.none() | counts,
        keep_bytes=st.none() | counts,
    ),
    "job.credit": st.builds(m.CreditParams, subscription=_numbers, bytes=_credit),
    "job.unfollow": st.builds(m.SubscriptionParams, subscription=_numbers),
    "volume.create": st.builds(
        m.VolumeSpec, name=volume_names, size_bytes=disk_sizes, thin=st.booleans()
    ),
    "volume.list": _nothing,
    "volume.remove": st.builds(m.VolumeParams, name=volume_names),
    "rpc.discover": _nothing,
}

_volumes = st.builds(
    Volume,
    name=volume_names,
    size_bytes=disk_sizes,
    used_bytes=st.integers(0, 1 << 60),
    jobs=st.integers(0, 99),
    thin=st.booleans(),
)
_removed = st.builds(m.Removed, jobs=st.lists(ids, max_size=3).map(tuple), bytes=counts)

RESULTS: dict[str, st.SearchStrategy[object]] = {
    "service.hello": st.builds(m.Welcome, version=texts, name=texts, role=texts),
    "job.plan": st.builds(
        m.Plan,
        limits=specs.map(lambda spec: spec.limits),
        steps=st.lists(
            st.builds(m.PlannedStep, name=texts, subject=texts, explanation=texts), max_size=3
        ).map(tuple),
    ),
    "job.run": st.builds(m.RunResult, job=records, subscription=st.none() | _numbers),
    "job.status": statuses,
    "job.list": st.builds(m.ListResult, jobs=st.lists(records, max_size=2).map(tuple)),
    "job.wait": records,
    "job.stop": records,
    "job.log": st.builds(m.LogResult, subscription=_numbers, offset=counts, starts=_starts),
    "job.remove": _removed,
    "job.prune": _removed,
    "job.credit": _nothing,
    "job.unfollow": _nothing,
    "volume.create": _nothing,
    "volume.list": st.builds(m.Volumes, volumes=st.lists(_volumes, max_size=3).map(tuple)),
    "volume.remove": _nothing,
    "rpc.discover": st.just(describe("1.0")),
}

headers = st.builds(
    m.OutputHeader,
    subscription=_numbers,
    stream=st.sampled_from(Stream),
    offset=counts,
    time=times,
)
ends = st.builds(
    m.OutputEnd,
    subscription=_numbers,
    offset=counts,
    job=records,
    error=st.none() | st.fixed_dictionaries({"name": texts, "message": texts}),
)
