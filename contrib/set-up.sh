#!/bin/sh
# Install what `make` needs: missing Debian packages (as root), and a virtual environment.
#
#   contrib/set-up.sh demo VENV    the packages that jobworker needs, and jobworker in VENV
#   contrib/set-up.sh tests VENV   also the tools of tests; a test whose tool is missing is skipped
#   contrib/set-up.sh bench        the programs that the benchmark compares with
#
# It skips steps that are done already. If it may not install a package, it names the package.
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

# use COMMAND PACKAGE...: the same for tools that only some tests use; does not fail
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
# For jobworker itself, and for the jobs of the demonstration, which run the host's programs.
need 'command -v ps' procps
need "$python -c 'import ctypes; ctypes.CDLL(\"libseccomp.so.2\")'" libseccomp2
need 'test -x /usr/bin/python3' python3-minimal
# mke2fs formats the jobs' disks, which only root's service has. It may be outside of PATH.
[ "$(id -u)" != 0 ] || need 'PATH=$PATH:/usr/sbin:/sbin; command -v mke2fs' e2fsprogs

extra=server
if [ "$what" = tests ]; then
    extra=dev
    # Tests compile attacks, and run these tools in jobs.
    use 'command -v gcc' gcc
    # A test assembles the trampoline's source, for both machines.
    use 'command -v aarch64-linux-gnu-as || test "$(uname -m)" = aarch64' binutils-aarch64-linux-gnu
    use 'PATH=$PATH:/usr/sbin:/sbin; command -v capsh' libcap2-bin
    use 'command -v stress-ng' stress-ng
    use 'PATH=$PATH:/usr/sbin:/sbin; command -v mkfs.btrfs' btrfs-progs
    # Tests make root trees by these.
    use 'command -v busybox' busybox-static
    use 'command -v mmdebstrap' mmdebstrap
    # For private networks of jobs, and for the virtual cables of their tests.
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
