# What `__getattr__` of __init__.py loads when it is asked for. Here and not there, under
# TYPE_CHECKING, since import-linter would take these for imports of the whole package.
from jobworker.client.client import Client as Client
from jobworker.client.job import Job as Job
from jobworker.client.opening import open_client as open_client
from jobworker.model.job import JobSpec as JobSpec
from jobworker.model.job import Limits as Limits

__version__: str
