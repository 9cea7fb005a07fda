#!/bin/bash
# boot.sh IMAGE [QEMU-OPTION...]: boots a disk image with emulation alone, without writing to it, until it asks for a
# login on the serial port and has reached multi-user; then switches it off. Exit 0 if it did within RESEAL_BOOT_LIMIT
# seconds (300). A guest that is slow asks for the login first, and systemd says nothing on a console that has one: it gets
# ten more seconds for what is still starting.
#
# RESEAL_BOOT_LOG names a file that is to keep the console's output.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
[ $# -ge 1 ] || die "usage: boot.sh IMAGE [QEMU-OPTION...]"
image="$(realpath "$1")"
shift
limit="${RESEAL_BOOT_LIMIT:-300}"

# What the guest writes lands in an unnamed file in TMPDIR, in the clear: so in memory only.
export TMPDIR=/dev/shm
scratch="$(mktemp -d)"
console="${RESEAL_BOOT_LOG:-$scratch/console}"
# Tried by hand, KVM may be there and yet hang: emulation works everywhere.
qemu-system-x86_64 -accel tcg,thread=multi -smp 2 -m 1024 -display none -monitor none -nic none -no-reboot \
    -serial "file:$console" -drive "file=${image//,/,,},format=raw,if=virtio,snapshot=on" "$@" </dev/null 2>"$scratch/errors" &
qemu=$!
trap 'kill -9 $qemu 2>/dev/null; wait $qemu 2>/dev/null || true; rm -rf "$scratch"' EXIT

began=$(date +%s%N)
seconds() { awk "BEGIN { printf \"%.1f\", ($(date +%s%N) - $began) / 1e9 }"; }
asked=
up() {
    grep -q 'login: ' "$console" 2>/dev/null || return 1
    asked="${asked:-$(date +%s)}"
    grep -q 'Multi-User System' "$console" || [ $(($(date +%s) - asked)) -ge 10 ]
}
while ! up; do
    if ! kill -0 $qemu 2>/dev/null || [ $((($(date +%s%N) - began) / 1000000000)) -ge "$limit" ]; then
        tail -n 20 "$console" "$scratch/errors" >&2 || true
        die "$image did not reach a login prompt ($(seconds) s)"
    fi
    sleep 0.1
done
say "$image reached a login prompt in $(seconds) s"
