#!/bin/sh
# Set up what `make` needs: Debian packages that are missing (as root), and a virtual environment.
#
#   contrib/set-up.sh VENV      Python, ps and the package with its extras, in VENV
#   contrib/set-up.sh --bench   the programs that the benchmark is measured beside
#
# It does nothing that is done already, and says what is missing where it may not install it.
set -eu
cd "$(dirname "$0")/.."

say() { printf '%s\n' "set-up: $*" >&2; }

# need COMMAND PACKAGE...: install the packages unless the command works
need() {
    check=$1
    shift
    sh -c "$check" >/dev/null 2>&1 && return
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        say "missing: $*; install it with this system's package manager, then run this again"
        exit 1
    fi
    say "installing $*"
    if ! DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@" >/dev/null 2>&1; then
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@" >/dev/null
    fi
}

if [ "${1:-}" = --bench ]; then
    need 'command -v bwrap' bubblewrap
    need 'command -v crun' crun
    need 'command -v runc' runc
    need 'command -v firejail' firejail
    exit 0
fi
venv=${1:?usage: contrib/set-up.sh VENV | --bench}

python=
for candidate in python3 python3.13 python3.12 python3.11 /usr/bin/python3; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    need '/usr/bin/python3 -c "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))"' \
        python3 python3-venv
    python=/usr/bin/python3
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        say "Python 3.11 or newer is needed; this system's python3 is older"
        exit 1
    }
fi
need 'command -v ps' procps
# Attacks are compiled, and real tools run, by the tests.
need 'command -v gcc' gcc
# The trampoline's source is assembled anew by a test, for both machines.
need 'command -v aarch64-linux-gnu-as || test "$(uname -m)" = aarch64' binutils-aarch64-linux-gnu
need 'PATH=$PATH:/usr/sbin:/sbin; command -v capsh' libcap2-bin
need 'command -v stress-ng' stress-ng
need "$python -c 'import ctypes; ctypes.CDLL(\"libseccomp.so.2\")'" libseccomp2
# Tests run jobs in root trees of these.
need 'command -v busybox' busybox-static
need 'command -v mmdebstrap' mmdebstrap
# Disks of jobs are formatted by this one; it lies outside of an ordinary user's PATH.
need 'PATH=$PATH:/usr/sbin:/sbin; command -v mke2fs' e2fsprogs
# Jobs run the host's own programs; the tests and the demonstration run this one.
need 'test -x /usr/bin/python3' python3-minimal
# Outbound connections of jobs with a network of their own, and the cable that the tests lay.
need 'command -v slirp4netns' slirp4netns
need 'command -v ip' iproute2

# The clients of contrib/clients, which the tests run.
need 'command -v openssl' openssl
need 'command -v jq' jq
need 'node -e "process.exit(Number(process.versions.node.split(\".\")[0]) < 18)"' nodejs
need 'command -v npm' npm
if ! [ -d contrib/clients/node/node_modules/ws ]; then
    say "installing the packages of contrib/clients/node"
    (cd contrib/clients/node && npm install --no-package-lock --no-audit --no-fund --loglevel=error >/dev/null)
fi

[ -x "$venv/bin/python" ] && "$venv/bin/python" -c '' 2>/dev/null || "$python" -m venv --clear "$venv"
say "installing the package into $venv"
"$venv/bin/pip" install -q --disable-pip-version-check -e '.[dev]'
