#!/bin/bash
# demo.sh: shows the main job on a disk that it makes: two backups, a mount, a file from each restore point, a VM that
# boots from one, a restore. Everything is made in a folder of its own, which is removed at the end.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

here="$workspace/tests/scripts"
bin="${RESEAL_BIN:-$workspace/target/release}"
disks="$cache/disk-small"
work="$(mktemp -d "${TMPDIR:-/tmp}/reseal-demo.XXXXXX")"
mnt="$work/restore"

cleanup() {
    if mountpoint -q "$mnt"; then "$bin/reseal" umount "$mnt" || umount -l "$mnt"; fi
    [ -z "${loop:-}" ] || losetup -d "$loop"
    rm -rf "$work"
}
trap cleanup EXIT

# Prints a command as it would be typed, and runs it.
show() { printf '\n$ %s\n' "${*//$work\//}"; "$@"; }

"$here/debian-disk.sh" --small "$disks"

export PATH="$bin:$PATH"
export RESEAL_REPO="$work/vault" RESEAL_KEYRING="$work/etc/keyring.json" RESEAL_STATE="$work/state"
export RESEAL_RECOVERY_PASSPHRASE_FILE="$work/passphrase"
mkdir -p "$work/usb" "$mnt"
(umask 077; head -c 16 /dev/urandom | od -An -tx1 | tr -d ' ' >"$work/passphrase")
cd "$work"

printf '\n# A vault, a keyring, a recovery kit.\n'
show reseal init --recovery "$work/usb/reseal-recovery.age"

printf '\n# A full backup, and one a day later that stores only what changed.\n'
show reseal backup web01 "$disks/base.raw"
show reseal backup web01 "$disks/day1.raw"

printf '\n# Several disks, one of them a block device, and a definition: one restore point.\n'
truncate -s 64M data.raw
mke2fs -q -t ext4 data.raw
loop="$(losetup --find --show --read-only data.raw)"
printf '<domain type="qemu"><name>db01</name></domain>\n' >db01.xml
show reseal backup db01 "root=$disks/base.raw" "data=$loop" --definition db01.xml

show reseal list
show reseal show web01@latest
show reseal verify

printf '\n# Every restore point as a decrypted disk.\n'
show reseal mount "$mnt" --background
show ls "$mnt" "$mnt/db01/latest/"
first="$(cd "$mnt/web01" && ls -d 2* | head -n 1)"
show debugfs -R 'cat /etc/hostname' "$mnt/web01/latest/disk-0.raw?offset=1048576" 2>/dev/null
printf '\n# A file that changed, from the first restore point and from the latest.\n'
show debugfs -R 'cat /etc/motd' "$mnt/web01/$first/disk-0.raw?offset=1048576" 2>/dev/null
show debugfs -R 'cat /etc/motd' "$mnt/web01/latest/disk-0.raw?offset=1048576" 2>/dev/null

printf '\n# It boots from there; what the guest writes goes to a snapshot in memory.\n'
show "$here/boot.sh" "$mnt/web01/latest/disk-0.raw"

printf '\n# The first restore point as a raw file.\n'
show reseal restore web01@1 "$work/web01-old.raw"
show cmp "$disks/base.raw" "$work/web01-old.raw"
printf 'identical\n'
show reseal umount "$mnt"

printf '\ndemo: all of it worked\n'
