# Declares the names that `__getattr__` of __init__.py imports. Rejected: imports in __init__.py
# under TYPE_CHECKING, because import-linter would count them as imports of the whole package.
from jobworker.client.client import Client as Client
from jobworker.client.following import Chunk as Chunk
from jobworker.client.job import Job as Job
from jobworker.client.job import JobOutput as JobOutput
from jobworker.client.opening import open_client as open_client
from jobworker.errors import JobworkerError as JobworkerError
from jobworker.model.job import JobRecord as JobRecord
from jobworker.model.job import JobSpec as JobSpec
from jobworker.model.job import JobStatus as JobStatus
from jobworker.model.job import Limits as Limits
from jobworker.model.job import Stream as Stream
from jobworker.model.lifecycle import State as State
from jobworker.model.volumes import VolumeMount as VolumeMount
from jobworker.protocol.messages import PruneParams as PruneParams

__version__: str
__all__: list[str]
