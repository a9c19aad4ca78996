#!/bin/sh
# Run the end-to-end scenarios on a throw-away machine with systemd and cgroup v2.
#
#   contrib/e2e.sh VENV RUN [SCENARIO...]
#
# This calls `RUN DIRECTORY COMMAND`. RUN must provide the content of DIRECTORY as /mnt/share of such
# a machine, run COMMAND there as root by sh, and exit with its exit code. The machine needs Python 3.11
# or newer, of the same minor version and architecture as VENV's.
# SCENARIO is a script of tests/e2e; without it, restart_under_systemd.py and service_on_v2.py run.
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
# Copies the packages that service and client need from this environment, without those of tests.
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
