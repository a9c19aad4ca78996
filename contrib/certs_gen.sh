#!/bin/sh
# Make the usual set of certificates: CA, server, admin and viewer client.
#
# This only finds `worker` and the directory; `worker certs init` does the work.

set -eu

usage() {
    cat <<'EOF'
usage: certs_gen.sh [--dir DIR] [--host NAME|IP ...]

Make ca, server, admin-client and viewer-client certificates and keys (PEM) in DIR
(default: ./certs). The server's certificate has the names localhost, 127.0.0.1, ::1
and every --host. Existing files are not overwritten.

This runs `worker certs init`, from PATH or from .venv/bin beside contrib, and passes
further arguments on to it.
EOF
}

has_directory=no
for argument in "$@"; do
    case $argument in
    -h | --help)
        usage
        exit 0
        ;;
    --dir | --dir=*) has_directory=yes ;;
    esac
done

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
if worker=$(command -v worker); then
    :
elif [ -x "$here/../.venv/bin/worker" ]; then
    worker=$here/../.venv/bin/worker
else
    echo "certs_gen.sh: cannot find worker on PATH or in .venv/bin; install jobworker first" >&2
    exit 127
fi

if [ "$has_directory" = no ]; then
    set -- --dir ./certs "$@"
fi
exec "$worker" certs init "$@"
