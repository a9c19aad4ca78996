#!/bin/sh
# Set up what `make` needs: Debian packages that are missing (as root), and a virtual environment.
#
#   contrib/set-up.sh demo VENV    what the product needs, and the package in VENV
#   contrib/set-up.sh tests VENV   that, and what tests use: a test whose tool is missing is skipped
#   contrib/set-up.sh bench        the programs that the benchmark is measured beside
#
# It does nothing that is done already, and says what is missing where it may not install it.
set -eu
cd "$(dirname "$0")/.."

say() { printf '%s\n' "set-up: $*" >&2; }

may_install() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }

# works COMMAND
works() { sh -c "$1" >/dev/null 2>&1; }

install() {
    say "installing $*"
    if ! DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@" >/dev/null 2>&1; then
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@" >/dev/null
    fi
}

# need COMMAND PACKAGE...: install the packages unless the command works
need() {
    check=$1
    shift
    works "$check" && return
    if ! may_install; then
        say "missing: $*; install it with this system's package manager, then run this again"
        exit 1
    fi
    install "$@"
}

# use COMMAND PACKAGE...: the same for what only some tests use
use() {
    check=$1
    shift
    works "$check" && return
    if may_install && install "$@"; then return; fi
    say "missing: $*; the tests that use it are skipped"
}

if [ "${1:-}" = bench ]; then
    need 'command -v bwrap' bubblewrap
    need 'command -v crun' crun
    need 'command -v runc' runc
    need 'command -v firejail' firejail
    exit 0
fi
what=${1:?usage: contrib/set-up.sh demo|tests VENV, or bench}
venv=${2:?usage: contrib/set-up.sh demo|tests VENV, or bench}
case $what in demo | tests) ;; *) say "demo, tests or bench, not $what"; exit 2 ;; esac

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
# The product, and the demonstration's jobs, which run the host's own programs.
need 'command -v ps' procps
need "$python -c 'import ctypes; ctypes.CDLL(\"libseccomp.so.2\")'" libseccomp2
need 'test -x /usr/bin/python3' python3-minimal
# Disks of jobs, which root's have, are formatted by this one; it may lie outside of PATH.
[ "$(id -u)" != 0 ] || need 'PATH=$PATH:/usr/sbin:/sbin; command -v mke2fs' e2fsprogs

extra=server
if [ "$what" = tests ]; then
    extra=dev
    # Attacks are compiled, and real tools run.
    use 'command -v gcc' gcc
    # The trampoline's source is assembled anew by a test, for both machines.
    use 'command -v aarch64-linux-gnu-as || test "$(uname -m)" = aarch64' binutils-aarch64-linux-gnu
    use 'PATH=$PATH:/usr/sbin:/sbin; command -v capsh' libcap2-bin
    use 'command -v stress-ng' stress-ng
    use 'PATH=$PATH:/usr/sbin:/sbin; command -v mkfs.btrfs' btrfs-progs
    # Jobs run in root trees of these.
    use 'command -v busybox' busybox-static
    use 'command -v mmdebstrap' mmdebstrap
    # Outbound connections of jobs with a network of their own, and the cable that the tests lay.
    use 'command -v slirp4netns' slirp4netns
    use 'PATH=$PATH:/usr/sbin:/sbin; command -v ip' iproute2
    # The clients of contrib/clients.
    use 'command -v openssl' openssl
    use 'command -v jq' jq
    use 'node -e "process.exit(Number(process.versions.node.split(\".\")[0]) < 18 ? 1 : 0)"' nodejs
    use 'command -v npm' npm
    if command -v npm >/dev/null && ! [ -d contrib/clients/node/node_modules/ws ]; then
        say "installing the packages of contrib/clients/node"
        (cd contrib/clients/node &&
            npm install --no-package-lock --no-audit --no-fund --loglevel=error >/dev/null) ||
            say "no packages for contrib/clients/node; the tests that use them are skipped"
    fi
fi

[ -x "$venv/bin/python" ] && "$venv/bin/python" -c '' 2>/dev/null || "$python" -m venv --clear "$venv"
say "installing the package into $venv"
"$venv/bin/pip" install -q --disable-pip-version-check -e ".[$extra]"
