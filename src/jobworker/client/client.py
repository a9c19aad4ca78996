"""The public client: a typed method for each method of the protocol.

`calls` keeps the connection and retries calls when it breaks.
"""

from collections.abc import Iterable, Mapping, Sequence

from attrs import asdict, define, evolve

from jobworker.client.calls import Calls
from jobworker.client.checked import checked
from jobworker.client.following import DELIVERY
from jobworker.client.job import Job
from jobworker.errors import InvalidParams, shortened
from jobworker.model.job import JobId, JobRecord, JobSpec
from jobworker.model.lifecycle import State
from jobworker.model.volumes import Volume
from jobworker.protocol import messages as m
from jobworker.serialization.exact import kind


@define(eq=False, kw_only=True)
class Client:
    """A client of one server; `open_client` makes one.

    Every method raises ConnectionFailed if the connection is lost and the patience is over,
    CertificateRefused if the server closes the connection because the client's certificate was
    revoked or has expired, PermissionDenied if the certificate's role does not allow the call, and
    NotFound for a job that does not exist. A cancelled call abandons its wait and stops no job.
    """

    _calls: Calls

    async def hello(self) -> m.Welcome:
        """Ask for the server's version, and for this client's name and role.

        >>> welcome = await client.hello()
        >>> welcome.name, welcome.role
        ('admin-client', 'admin')
        """
        return await self._calls.call("service.hello", m.Nothing(), m.Welcome)

    async def run(self, spec: JobSpec | Sequence[str], *, follow: bool = False) -> Job:
        """Run a command, given as a list or in a JobSpec, and return the admitted job.

        With `follow`, the reply opens a subscription to the output, which saves `Job.output` a
        round trip; one window of output is buffered until `Job.output` is called.

        Raises InvalidParams, TooLarge, Busy, SandboxError if the job cannot be started, and
        ConnectionFailed if it is unknown whether it was started.

        >>> job = await client.run(["echo", "hello"])
        >>> async for chunk in job.output():
        ...     print(chunk.stream.value, chunk.data)
        stdout b'hello\\n'
        >>> (await job.wait()).state
        <State.COMPLETED: 'COMPLETED'>

        >>> limits = Limits(cpu_percent=50, memory_bytes=64 << 20)
        >>> job = await client.run(JobSpec(command=("nproc",), limits=limits, timeout_seconds=60))
        >>> job.record.owner
        'admin-client'

        >>> await client.run(["no-such-program"])
        Traceback (most recent call last):
        jobworker.errors.CommandNotFound: cannot run 'no-such-program': ...
        """
        job = _spec(spec)
        if type(follow) is not bool:
            raise InvalidParams(
                f"cannot run the command: follow: must be true or false, not {kind(follow)}"
            )
        params = m.RunParams(job=job, follow=DELIVERY if follow else None)
        uncertain = "the job may have been started: see the list before running it again"
        rpc, result = await self._calls.call_once("job.run", params, m.RunResult, uncertain)
        first = None if result.subscription is None else rpc.following(result.subscription, 0)
        return Job(self._calls, result.job.id, result.job, first)

    async def plan(self, spec: JobSpec | Sequence[str]) -> m.Plan:
        """Return how a command would be run: its limits, and the steps of its start. Runs nothing.

        Raises the same errors as `run` before the first step of a start.

        >>> plan = await client.plan(["true"])
        >>> plan.steps[0].name, plan.steps[-1].subject
        ('attach-scope', '')
        """
        return await self._calls.call("job.plan", m.PlanParams(job=_spec(spec)), m.Plan)

    def job(self, number: int) -> Job:
        """Return the job with this id, without a request to the server.

        >>> job = client.job((await client.run(["true"])).id)
        >>> (await job.wait()).exit_code
        0

        >>> await client.job(999_999_999).status()
        Traceback (most recent call last):
        jobworker.errors.NotFound: cannot find job 999999999: ...
        """
        return Job(self._calls, JobId(number))

    async def list(
        self,
        *,
        states: Iterable[State | str] = (),
        labels: Mapping[str, str] | None = None,
        name: str = "",
        limit: int = 100,
        before: int | None = None,
    ) -> tuple[JobRecord, ...]:
        """List summaries of at most `limit` (at most 1000) jobs, newest first.

        The jobs are in one of `states` (any state if empty), have all of `labels`, have the name
        `name` (any name if ""), and have ids below `before`, the smallest id of the page before. If
        the search is long, fewer jobs are returned; an empty result is the end. A summary has no
        variables, and its command may be cut (`record.abridged`); `Job.status` returns the whole
        record.

        >>> job = await client.run(["sleep", "60"])
        >>> [record.spec.command for record in await client.list(states=[State.RUNNING], limit=1)]
        [('sleep', '60')]
        """
        params = checked(
            "list jobs",
            m.ListParams,
            states=states,
            labels=labels or {},
            name=name,
            limit=limit,
            before=before,
        )
        while True:
            page = await self._calls.call("job.list", params, m.ListResult)
            if page.jobs or page.next is None:
                return page.jobs
            params = evolve(params, before=page.next)

    async def prune(self, params: m.PruneParams) -> m.Removed:
        """Remove ended jobs' output, the oldest first; their records stay.

        >>> (await client.prune(PruneParams(older_than_seconds=86400))).jobs
        ()
        """
        if not isinstance(params, m.PruneParams):
            raise InvalidParams(
                f"cannot prune: params: must be PruneParams, not {kind(params)}",
                remedy="such as PruneParams(older_than_seconds=86400)",
            )
        sound = checked("prune", m.PruneParams, **asdict(params))
        return await self._calls.call("job.prune", sound, m.Removed)

    async def make_volume(self, name: str, size_bytes: int, *, thin: bool = False) -> None:
        """Create a volume: a disk of this size, at least 16 MiB, that outlives jobs.

        The server reserves the size on its disk. A `thin` volume uses only the space that is
        written to it; if the server's disk is full, a job that writes to it loses its data and is
        FAILED. In both cases, the size must fit into the disk's free space at the creation.

        Raises InvalidParams if the volume exists, or if the server's disk has no room for it.

        >>> await client.make_volume("cache", 64 << 20)
        >>> await client.remove_volume("cache")
        """
        spec = checked("make the volume", m.VolumeSpec, name=name, size_bytes=size_bytes, thin=thin)
        uncertain = "the volume may have been made: see the list before making it again"
        await self._calls.call_once("volume.create", spec, m.Nothing, uncertain)

    async def volumes(self) -> tuple[Volume, ...]:
        """List all volumes, by name.

        >>> await client.make_volume("kept", 16 << 20)
        >>> [volume.name for volume in await client.volumes()]
        ['kept']
        >>> await client.remove_volume("kept")
        """
        return (await self._calls.call("volume.list", m.Nothing(), m.Volumes)).volumes

    async def remove_volume(self, name: str) -> None:
        """Remove a volume with its files. Raises NotFound, and Busy while a live job uses it.

        >>> await client.make_volume("old", 16 << 20)
        >>> await client.remove_volume("old")
        """
        params = checked("remove the volume", m.VolumeParams, name=name)
        await self._calls.call("volume.remove", params, m.Nothing, gone=m.Nothing())


def _spec(spec: JobSpec | Sequence[str]) -> JobSpec:
    if isinstance(spec, str):
        raise InvalidParams(
            f"cannot run {shortened(spec)!r}: the command is one string",
            remedy='give a list of program and arguments: ["ls", "-l"], or ["sh", "-c", "ls | wc"]',
        )
    values = {"command": spec} if not isinstance(spec, JobSpec) else asdict(spec, recurse=False)
    made = checked("run the command", JobSpec, **values)
    made.check_size()
    return made
