#!/bin/bash
# encryption-levels.sh: what backups cost where the disk is encrypted by the hypervisor (whose plaintext is backed up), and
# where the guest encrypts it itself (whose ciphertext is backed up as it is). Prints a Markdown table.
#
# The plaintext is the test disk and its next days. The ciphertext is what the guest would have on such a disk: one LUKS
# volume (AES-256-XTS) to which the same blocks are written, day by day under the same key, in writes of 4 KiB. The second VM
# has a disk with the same content: in a volume with a key of its own, as each guest that is installed has.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

here="$workspace/tests/scripts"
bin="${RESEAL_BIN:-$workspace/target/release}"
disks="$cache/disk"
days=(base day1 day2)
work="$(mktemp -d "${TMPDIR:-/tmp}/reseal-levels.XXXXXX")"
trap 'rm -rf "$work"' EXIT

"$here/debian-disk.sh" "$disks" >/dev/null
export RESEAL_KEYRING="$work/keyring.json" RESEAL_STATE="$work/state"
printf 'secret of the volume' >"$work/secret"
key="secret,id=key,file=$work/secret"

# QEMU measures the processor to make a key slot; on a busy machine it can find that it took no time at all.
make_volume() {
    local try
    for try in 1 2 3 4 5; do
        if qemu-img create -q --object "$key" -f luks -o key-secret=key,iter-time=10,hash-alg=sha512 "$1" "$2" 2>"$work/errors"; then return; fi
    done
    die "$1 could not be made: $(cat "$work/errors")"
}

volume() { printf '{"driver":"luks","key-secret":"key","file":{"driver":"file","filename":"%s"}}' "$1"; }

# Writes disk $1 into volume $2, only what is not zero: a guest does not write what it does not use.
fill() {
    qemu-img convert -n --target-is-zero --object "$key" -f raw --target-image-opts "$1" \
        "driver=luks,key-secret=key,file.driver=file,file.filename=$2"
}

# Writes into volume $3 the blocks of 4 KiB in which disk $2 differs from disk $1.
write_changes() {
    local delta="$work/delta.qcow2"
    qemu-img create -q -f qcow2 -o cluster_size=4096 -F raw -b "$2" "$delta"
    qemu-img rebase -q -f qcow2 -F raw -b "$1" "$delta"
    qemu-img rebase -q -u -f qcow2 -F luks -b "json:$(volume "$3")" "$delta"
    qemu-img commit -q --object "$key" -f qcow2 -d "$delta" 2>/dev/null || qemu-img commit -q --object "$key" -d \
        --image-opts "driver=qcow2,file.driver=file,file.filename=$delta"
    rm "$delta"
}

# One number of the last backup.
stat() { python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["stats"][sys.argv[2]])' "$work/$1.json" "$2"; }

backup() { "$bin/reseal" backup --json --raw "$2" "$3" >"$work/$1.json"; }

measure() {
    local level="$1" day
    export RESEAL_REPO="$work/vault-$level"
    "$bin/reseal" init --no-recovery --quiet
    for day in "${days[@]}"; do
        if [ "$level" = guest ]; then
            make_ciphertext "$day"
            backup "$level-$day" web01 "$work/volume.luks"
        else
            backup "$level-$day" web01 "$disks/$day.raw"
        fi
    done
    if [ "$level" = guest ]; then
        rm "$work/volume.luks"
        make_volume "$work/other.luks" "$(command stat -c %s "$disks/base.raw")"
        fill "$disks/base.raw" "$work/other.luks"
        backup "$level-other" web02 "$work/other.luks"
        rm "$work/other.luks"
    else
        backup "$level-other" web02 "$disks/base.raw"
    fi
}

make_ciphertext() {
    case "$1" in
    base)
        make_volume "$work/volume.luks" "$(command stat -c %s "$disks/base.raw")"
        fill "$disks/base.raw" "$work/volume.luks"
        ;;
    day1) write_changes "$disks/base.raw" "$disks/day1.raw" "$work/volume.luks" ;;
    day2) write_changes "$disks/day1.raw" "$disks/day2.raw" "$work/volume.luks" ;;
    esac
    python3 - "$disks/$1.raw" "$key" "$(volume "$work/volume.luks")" <<'CHECK' || die "the volume does not hold $1"
# Whoever opens the volume must see that day's blocks, or the numbers are not of what they say. A sample, with a fixed seed.
# Blocks that the guest never wrote decrypt to noise, so only those with content are looked at.
import os, random, re, subprocess, sys
path, key, volume = sys.argv[1:]
random.seed(1)
wanted = {}
with open(path, "rb") as disk:
    size = os.path.getsize(path)
    while len(wanted) < 400:
        at = random.randrange(size // 4096) * 4096
        block = os.pread(disk.fileno(), 4096, at)
        if any(block):
            wanted[at] = block
commands = [word for at in wanted for word in ("-c", f"read -v {at} 4096")]
shown = subprocess.run(["qemu-io", "-r", "--object", key, *commands, "json:" + volume], capture_output=True, text=True, check=True)
lines = re.findall(r"^([0-9a-f]{8,}):  ((?:[0-9a-f]{2} ){16})", shown.stdout, re.M)
found = {}
for at, row in lines:
    found.setdefault(int(at, 16) & ~4095, []).append(bytes.fromhex(row))
sys.exit(any(b"".join(found.get(at, [])) != block for at, block in wanted.items()))
CHECK
}

mb() { awk "BEGIN { printf \"%.*f MB\", ($1 < 1e6 ? 2 : $1 < 1e8 ? 1 : 0), $1 / 1e6 }"; }

row() {
    local title="$1" point="$2" level cells=
    for level in image guest; do
        cells+=" $(mb "$(stat "$level-$point" changed)") | $(mb "$(stat "$level-$point" stored)") |"
    done
    local image guest
    image="$(stat "image-$point" stored)" guest="$(stat "guest-$point" stored)"
    # What deduplication leaves of a copy is bookkeeping: no number of times says more than the sizes do.
    printf '| %s |%s %s |\n' "$title" "$cells" "$(awk "BEGIN { if ($image < 1e6) print \"–\"; else printf \"%.1f ×\", $guest / $image }")"
}

say "the plaintext"
measure image
say "the ciphertext"
measure guest
cat <<HEAD
| | image level: changed | image level: stored | in the guest: changed | in the guest: stored | in the guest / image level |
| --- | ---: | ---: | ---: | ---: | ---: |
HEAD
row 'first backup' base
row 'day 1: files, logs, a database' day1
row 'day 2: 2,000 updates of that database' day2
row 'second VM with the same content' other
