#!/usr/bin/env bash
# Builds the Dockerfile where there are no images to pull and no GPU, and runs the smoke graph in it: a Debian root made here
# instead of NVIDIA's base, and the CPU lock instead of the CUDA one.
#
#   tools/container.sh build [DIR]    base and image, in DIR (default /var/tmp/megatron_ext_container)
#   tools/container.sh smoke [DIR]    check the image, and run demo:smoke in it as its user
#   tools/container.sh all [DIR]      both, and then remove DIR
#   tools/container.sh shell [DIR]    a shell in the image
#   tools/container.sh clean [DIR]    remove DIR and what is in it
#
# Packages come from wherever apt and pip are set up to look on this machine. They are fetched outside the build, which has no
# settings of theirs and looks at no index. Needs root, Debian 12 with Python 3.11, and its packages buildah and mmdebstrap.
# shellcheck disable=SC2016  # what stands in single quotes is for another program to expand
set -euo pipefail
cd "$(dirname "$0")/.."

LOCK=tools/locks/cpu-py311.txt
NAME=localhost/megatron_ext
BASE=localhost/debian_python
KEYS=/usr/share/keyrings/debian-archive-keyring.gpg
SYSTEM=ca-certificates,python3,python3-venv # of the base; python3-venv has pip for new environments

usage() { sed -n '2,/^# shellcheck/{/^# shellcheck/d;s/^# \{0,1\}//;p}' "$0"; }
fail() {
    printf 'container.sh: %s\n' "$*" >&2
    exit 1
}
timed() { # NAME COMMAND...
    local name=$1 began=$SECONDS
    shift
    "$@"
    printf '%5d s  %s\n' $((SECONDS - began)) "$name"
}

# Storage of its own: nothing of the machine's images is seen or changed, and removing DIR removes all.
STORE=() # options of every buildah command; set with D
in_storage() { buildah "${STORE[@]}" "$@"; }
offline() { unshare --net buildah "${STORE[@]}" "$@"; }

check() {
    local program
    [ "$(id -u)" = 0 ] || fail "needs root, who alone may make a Debian root and mount layers (try sudo)"
    for program in buildah mmdebstrap python3.11; do
        command -v "$program" >/dev/null || fail "$program is missing; on Debian 12: apt-get install -y --no-install-recommends buildah mmdebstrap"
    done
}

archives() { # of apt's settings, the lines of Debian itself, whatever the format they are written in
    apt-get indextargets --format 'deb $(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' 'Origin: Debian' | sort -u
}

make_base() {
    local suite container
    # shellcheck source=/dev/null
    suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
    [ -n "$(archives)" ] || fail "apt knows no archive of Debian yet: run apt-get update"
    # Where apt looks here is this machine's business: no trace of it goes into the base.
    archives | mmdebstrap --quiet --variant=minbase --keyring="$KEYS" --include="$SYSTEM" \
        --customize-hook='rm -rf "$1"/etc/apt/sources.list "$1"/etc/apt/apt.conf.d/99mmdebstrap "$1"/etc/resolv.conf "$1"/etc/hostname' \
        "$suite" "$D/base.tar" -
    container=$(in_storage from scratch)
    in_storage add --quiet "$container" "$D/base.tar" / >/dev/null
    in_storage commit --quiet --rm "$container" "$BASE" >/dev/null
    rm "$D/base.tar"
}

fetch_wheels() { # what the lock names, and what builds the project
    python3.11 -m venv "$D/pip"
    "$D/pip/bin/pip" wheel -qq --no-deps --wheel-dir "$D/wheels" -r "$LOCK" setuptools
    rm -rf "$D/pip"
}

build_image() {
    # chroot isolation shares the network, so the build gets one that leads nowhere.
    offline bud --quiet --isolation chroot --build-context "wheels=$D/wheels" --build-arg BASE="$BASE" \
        --build-arg LOCK="$LOCK" --build-arg PIP_NO_INDEX=1 --build-arg SYSTEM_PACKAGES= --tag "$NAME" . >/dev/null
    rm -rf "$D/wheels"
}

in_image() { # COMMAND...: as the image's user; its container is removed whatever happens
    local container status=0
    container=$(in_storage from --pull-never "$NAME")
    in_storage run --isolation chroot "$container" -- "$@" || status=$?
    in_storage rm "$container" >/dev/null
    return $status
}

# Nothing of this machine's settings, and nothing left over, is in the image.
check_image() {
    local container root found
    container=$(in_storage from --pull-never "$NAME")
    root=$(in_storage mount "$container")
    found=$(leaks "$root" && leftovers "$root")
    in_storage rm "$container" >/dev/null
    [ -z "$found" ] || fail "the image has in it what should have stayed outside:"$'\n'"$found"
}

leaks() { # ROOT: files that name a host or a folder of this machine's settings; the rest of /usr is Debian's own files
    local folder word
    for word in $(settings_words); do
        for folder in etc home opt root run tmp usr/local var; do
            { grep -rlF --devices=skip -e "$word" "$1/$folder" || true; } | sed "s#^$1\(.*\)#\1 names '$word'#"
        done
    done
}

leftovers() { # ROOT: caches, lists, and what was there for the build alone
    local places=(wheels run/secrets tmp root/.cache home/trainer/.cache var/cache/apt var/lib/apt/lists etc/apt/sources.list etc/pip.conf)
    (cd "$1" && find "${places[@]}" -type f -size +0 2>/dev/null | sed 's#^#/#') || true
}

settings_words() { # hosts, and folders of packages
    {
        archives
        python3.11 -m pip config list
    } | { grep -oE "(https?|file)://[^ '\"]+|^[^=]*find-links='[^']+" || true; } |
        sed -E "s#^https?://([^/@]*@)?([^/:]+).*#\2#; s#^file://##; s#^.*find-links='##" | sort -u
}

build() {
    rm -rf "$D"
    mkdir -p "$D"
    timed "Debian base" make_base
    timed "wheels" fetch_wheels
    timed "image" build_image
}

smoke() {
    timed "nothing left over" check_image
    in_image sh -c '[ "$(id -u)" != 0 ] && ! [ -w /opt/venv ] && ! [ -w /opt/megatron_ext ]' || fail "the image runs as root, or as one who can write to its packages"
    timed "demo:smoke" in_image megatron-ext launch demo:smoke --local
}

clean() {
    [ ! -d "$D/storage" ] || in_storage rmi --all --force >/dev/null 2>&1 || true
    if [ -d "$D/storage/overlay" ] && mountpoint -q "$D/storage/overlay"; then umount "$D/storage/overlay"; fi
    rm -rf "$D"
}

D=$(realpath -m "${2:-/var/tmp/megatron_ext_container}")
STORE=(--root "$D/storage" --runroot "$D/run" --storage-driver overlay)
case ${1-} in
    build | smoke | shell | all) check ;;&
    build) build ;;
    smoke) smoke ;;
    shell) in_image bash ;;
    all)
        trap clean EXIT
        build
        smoke
        ;;
    clean) clean ;;
    *)
        usage
        [ "${1-}" = --help ]
        ;;
esac
