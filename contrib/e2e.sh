#!/bin/sh
# Run the end-to-end scenarios on a throw-away machine with systemd and cgroup v2.
#
#   contrib/e2e.sh VENV RUN [SCENARIO...]
#
# RUN is a command that is called as `RUN DIRECTORY COMMAND`: it is to have what stands in DIRECTORY
# in /mnt/share of such a machine, run COMMAND there as root by sh, and exit with its code. The
# machine needs Python 3.11 or newer of the same minor version and architecture as VENV's.
# SCENARIO: scripts of tests/e2e, "restart_under_systemd.py" and "service_on_v2.py" unless given.
set -eu
cd "$(dirname "$0")/.."
venv=${1:?usage: contrib/e2e.sh VENV RUN [SCENARIO...]}
run=${2:?usage: contrib/e2e.sh VENV RUN [SCENARIO...]: make e2e E2E_RUN=COMMAND}
shift 2
[ $# -gt 0 ] || set -- restart_under_systemd.py service_on_v2.py

bundle=$(mktemp -d)
trap 'rm -rf "$bundle"' EXIT
cp -r src tests contrib etc pyproject.toml "$bundle"
find "$bundle" -name __pycache__ -prune -exec rm -rf {} +
"$venv/bin/python" - "$bundle/site" <<'END'
# What the service and the client need, from this environment, without what only tests need.
import importlib.metadata, re, shutil, sys
from pathlib import Path
target, done, names = Path(sys.argv[1]), set(), ["jobworker"]
while names:
    name = re.sub(r"[-_.]+", "-", names.pop()).lower()
    if name in done:
        continue
    done.add(name)
    package = importlib.metadata.distribution(name)
    for line in package.requires or ():
        marker = line.partition(";")[2]
        if "extra" not in marker or (name == "jobworker" and "server" in marker):
            wanted = re.match(r"[\w.-]+", line)[0]
            try:
                importlib.metadata.distribution(wanted)
            except importlib.metadata.PackageNotFoundError:
                continue  # for another platform or Python
            names.append(wanted)
    if name == "jobworker":
        continue
    for file in package.files or ():
        source = Path(package.locate_file(file))
        if ".." not in file.parts and source.is_file() and "__pycache__" not in file.parts:
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / file)
END
status=0
for scenario in "$@"; do
    echo "== $scenario"
    "$run" "$bundle" "cd /mnt/share && PYTHONPATH=/mnt/share/site python3 tests/e2e/$scenario" \
        || status=1
done
exit $status
