"""Commands and options of similar tools, and what to write here instead.

They are hints, not aliases: each thing has one name, so scripts and documents agree.
"""

import re

HINTS = {
    "worker-cli": {
        "write worker-cli list": "ps ls get squeue",
        "write worker-cli status or worker-cli list": "top",
        "write worker-cli status": "inspect show describe",
        "write worker-cli stop": "kill cancel scancel",
        "write worker-cli log": "logs",
        "write worker-cli log --follow": "attach",
        "write worker-cli rm": "delete",
        "write worker-cli run": "start submit sbatch",
        "write worker-cli --help": "help",
        "nothing can enter a running job yet": "exec",
    },
    "worker-cli run": {
        "write --max-memory": "-m --memory --mem --max-mem",
        "write --max-cpu, in percent of one core": "--cpus --cpu",
        "write --max-pids": "--pids-limit",
        "write --max-memory, --max-cpu and the like": "--property",
        "leave it out: on the host's network a job listens at the host's own ports": "--publish",
        "leave it out: a server has no partitions": "--partition",
        "leave it out: on the host's network a job listens at the host's own ports, and a server "
        "has no partitions; for limits write --max-memory, --max-cpu and the like": "-p",
        "write --timeout": "--time",
        "write --name": "--unit",
        "write --network": "--net",
        "write --user": "--uid",
        "write --env": "-E --setenv",
        "write --follow, or wait for it with worker-cli wait": "--wait",
        "leave it out: a job is detached as it is": "-d --detach",
        "leave it out: a job has no terminal and no input yet": "-i -t --interactive --tty",
        "leave it out: a job cannot choose its host name": "--hostname",
        "leave it out: no job has rights over the host": "--privileged",
        "leave it out: worker-cli rm and worker-cli prune remove what has ended": "--rm",
    },
    "worker-cli list": {
        "leave it out: ended jobs are listed too": "-a --all",
        "take the ids from --json": "-q --quiet",
    },
    "worker-cli stop": {"write --signal": "-s", "write --grace": "-t --time --timeout"},
    "worker-cli rm": {"write --force": "-f"},
    "worker-cli volume": {
        "write worker-cli volume list": "ls inspect",
        "write worker-cli volume rm": "remove delete",
        "write worker-cli volume rm for each that no job has, by worker-cli volume list": "prune",
    },
}
"""By command: the advice, and the words of other tools that it answers."""
_UNKNOWN = re.compile(r"No such (?:command|option):? '?(?P<name>[^\s'.]+)'?")


def hint(command_path: str, message: str) -> str:
    """The advice for an unknown command or option; "" if there is none."""
    found = _UNKNOWN.match(message)
    meant = HINTS.get(command_path, {}).items()
    return next((todo for todo, words in meant if found and found["name"] in words.split()), "")
