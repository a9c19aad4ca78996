#!/bin/sh
# Make the classical set of certificates in one go: CA, server, admin and viewer client.
#
# All work is done by `worker certs init`; this only finds `worker` and the directory.

set -eu

usage() {
    cat <<'EOF'
usage: certs_gen.sh [--dir DIR] [--host NAME|IP ...]

Make ca, server, admin-client and viewer-client certificates and keys (PEM) in DIR,
./certs unless said otherwise. The server's certificate bears localhost, 127.0.0.1, ::1
and every --host. Nothing that exists is overwritten.

This runs `worker certs init`, from PATH or from .venv/bin beside contrib; further
arguments are passed on to it.
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
