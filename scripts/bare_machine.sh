#!/usr/bin/env bash
# Does the project install and pass its tests on a machine with nothing but Debian, Python, a compiler and pip? Makes such
# a root in a folder, clones HEAD into it, and runs `make setup` and the tests as an ordinary user, in a path with a space.
# Then it takes things away one by one. Needs root, debootstrap and a Debian mirror.
#
#   scripts/bare_machine.sh FOLDER [CASE...]
#   CASE       compiler headers venv python library setup test hindered old-cpu; by default all, in this order
#   RELEASE    of Debian, bookworm by default; OLD, one whose Python is too old, bullseye by default
#   BIND       folders that are to be seen in the root too, such as one with wheels that pip's settings name
#   LOG        where the results are added, a line each
# pip's settings in the environment (PIP_*) are passed on.
set -euo pipefail

# In a mount namespace of its own: what is mounted here is gone when this ends, and nobody deletes /dev with FOLDER.
[[ -n ${PRIVATE:-} ]] || exec env PRIVATE=1 unshare --mount --propagation private "$0" "$@"

ROOT=$(realpath -m "${1:?usage: scripts/bare_machine.sh FOLDER [CASE...]}")
shift
CASES=("$@")
((${#CASES[@]})) || CASES=(compiler headers venv python library setup test hindered old-cpu)
RELEASE=${RELEASE:-bookworm}
OLD=${OLD:-bullseye}
LOG=${LOG:-$ROOT.log}
CHECKOUT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
NAME="a folder/grm-rlhf"
CLONE="/home/user/$NAME"

say() { echo "bare machine: $*" | tee -a "$LOG"; }

bare_root() { # folder release packages
    [[ -f $1/.made ]] && return
    debootstrap --variant=minbase --include="$3" "$2" "$1" "${MIRROR:-http://deb.debian.org/debian}" >"$1.debootstrap.log"
    touch "$1/.made"
}

mounted() { # folder: what programs expect to find
    mount -t proc proc "$1/proc"
    mount --rbind /dev "$1/dev"
    mount --rbind /sys "$1/sys"
    cp /etc/resolv.conf /etc/hosts "$1/etc/"
    mkdir -p "$1/etc/ssl/certs" && cp /etc/ssl/certs/ca-certificates.crt "$1/etc/ssl/certs/"
    for folder in ${BIND:-}; do
        mkdir -p "$1$folder"
        mount --bind "$folder" "$1$folder"
    done
}

within() { # command, as an ordinary user of the root; variables for pip alone are passed on
    local passed=()
    while IFS= read -r variable; do passed+=("$variable"); done < <(env | grep '^PIP_' || true)
    chroot --userspec=1000:1000 "$ROOT" /usr/bin/env -i HOME=/home/user USER=user LANG=C.UTF-8 \
        PATH=/usr/local/bin:/usr/bin:/bin "${passed[@]}" bash -c "cd '$CLONE' && $1"
}

as_root() { chroot "$ROOT" /usr/bin/env DEBIAN_FRONTEND=noninteractive LANG=C.UTF-8 PATH=/usr/sbin:/usr/bin:/sbin:/bin bash -c "$1"; }

adds() { as_root "apt-get install -y -qq --no-install-recommends $1 >/dev/null 2>&1"; }

cloned() {
    [[ -d $ROOT$CLONE ]] && return
    as_root "id user >/dev/null 2>&1 || useradd --uid 1000 --create-home user"
    git clone -q --no-hardlinks "$CHECKOUT" "$ROOT$CLONE"
    chown -R 1000:1000 "$ROOT/home/user"
}

refused() { # what is missing, the words that the message must have
    local output
    if output=$(within "make setup" 2>&1); then
        say "$1: FAILED, make setup went through"
        exit 1
    fi
    if grep -qF "$2" <<<"$output" && ! grep -q Traceback <<<"$output"; then
        say "$1: refused: $(grep -F "$2" <<<"$output" | head -1)"
    else
        say "$1: FAILED: $(tail -3 <<<"$output")"
        exit 1
    fi
}

goes() { # what it is, command
    local start=$SECONDS
    if within "$2" >"$ROOT.$(tr -c 'a-z0-9\n' - <<<"$1").log" 2>&1; then
        say "$1: passed in $((SECONDS - start)) s"
    else
        say "$1: FAILED after $((SECONDS - start)) s, see $ROOT.$(tr -c 'a-z0-9\n' - <<<"$1").log"
        exit 1
    fi
}

hindered() { # no network, a home that cannot be written, 8 GB of memory
    local group=/sys/fs/cgroup/grm-bare-machine limit=memory.max peak=memory.peak
    if [[ -d /sys/fs/cgroup/memory ]]; then # the first version of control groups
        group=/sys/fs/cgroup/memory/grm-bare-machine limit=memory.limit_in_bytes peak=memory.max_usage_in_bytes
    fi
    mkdir -p "$group"
    echo 8000000000 >"$group/$limit"
    mount --bind "$ROOT/home/user" "$ROOT/home/user"
    mount --bind "$ROOT$CLONE" "$ROOT$CLONE"
    mount -o remount,ro,bind "$ROOT/home/user"
    (
        echo "$BASHPID" >"$group/cgroup.procs"
        export -f within goes say
        export ROOT CLONE LOG
        unshare -n bash -ec 'ip link set lo up 2>/dev/null || true
            goes "no network, read-only home, 8 GB: the smoke run" "make setup && make rm ppo eval CONFIG=configs/smoke.yaml"'
    )
    umount "$ROOT$CLONE" "$ROOT/home/user"
    say "most memory of it, cached files included: $(($(cat "$group/$peak") >> 20)) MiB"
    rmdir "$group" || true
}

old_cpu() { # instructions of 2013: the flags are hidden from whoever reads them, and the libraries are told
    sed -E 's/ (avx512|amx|avx_vnni)[a-z0-9_]*//g' /proc/cpuinfo >"$ROOT/tmp/cpuinfo"
    mount --bind "$ROOT/tmp/cpuinfo" "$ROOT/proc/cpuinfo"
    local told="ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2"
    goes "no avx512, no bfloat16: the smoke run" "$told make rm ppo eval CONFIG=configs/smoke.yaml SET=run.name=old-cpu"
    umount "$ROOT/proc/cpuinfo"
}

say "$(date -u +%F) $(git -C "$CHECKOUT" rev-parse --short HEAD), Debian $RELEASE, $(nproc) cores"
bare_root "$ROOT" "$RELEASE" make,git,ca-certificates
mounted "$ROOT"
cloned
for case in "${CASES[@]}"; do
    case $case in
        python)
            bare_root "$ROOT.old" "$OLD" make,git,python3,g++
            mounted "$ROOT.old"
            (
                ROOT=$ROOT.old
                cloned
                refused "Python of Debian $OLD" "is Python 3.11 or 3.12"
            )
            ;;
        compiler)
            adds python3
            refused "no compiler" "no C++ compiler"
            ;;
        headers)
            adds g++
            refused "no headers of Python" "no Python headers"
            ;;
        venv)
            adds python3-dev
            refused "no venv module" "no venv module"
            adds python3-venv
            ;;
        setup) goes "make setup" "make setup" ;;
        library)
            refused "no libnuma" "no libnuma.so.1"
            adds libnuma1
            ;;
        test) goes "make test" "make lint && make types && make test" ;;
        hindered) hindered ;;
        old-cpu) old_cpu ;;
        *)
            echo "unknown case $case" >&2
            exit 2
            ;;
    esac
done
