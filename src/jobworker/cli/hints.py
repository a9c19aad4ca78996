"""What people type who come from other tools, and what it is called here.

Hints alone: there is one name for each thing, so that scripts and documents read alike.
"""

import re

_COMMANDS = {
    "ps": "list",
    "ls": "list",
    "kill": "stop",
    "cancel": "stop",
    "inspect": "status",
    "show": "status",
    "logs": "log",
    "delete": "rm",
}
_OPTIONS = {
    "--memory": "--max-memory",
    "-m": "--max-memory",
    "--cpus": "--max-cpu, in percent of one core",
    "--cpu": "--max-cpu, in percent of one core",
    "--pids-limit": "--max-pids",
}
_RUN = "worker-cli run"
_UNKNOWN = re.compile(r"No such (?:command|option):? '?(?P<name>[^\s'.]+)'?")


def hint(command_path: str, message: str) -> str:
    """What to write instead of a command or option that there is not; "" if nobody can tell."""
    found = _UNKNOWN.match(message)
    if found is None:
        return ""
    if command_path == "worker-cli" and (command := _COMMANDS.get(found["name"])):
        return f"write worker-cli {command}"
    if command_path == _RUN and (option := _OPTIONS.get(found["name"])):
        return f"write {option}"
    return ""
