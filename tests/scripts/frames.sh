#!/bin/bash
# frames.sh: measures frame sizes and zstd levels through the real path: time and bytes of three backups, and cold 4 KiB
# random reads and a sequential read through the mount. Prints a Markdown table.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

bin="$workspace/target/release"
"$workspace/tests/scripts/debian-disk.sh" "$cache/disk"
work="$(mktemp -d "$workspace/target/frames.XXXXXX")"
mnt="$work/mnt"
cleanup() {
    if mountpoint -q "$mnt"; then "$bin/reseal" umount "$mnt" || umount -l "$mnt"; fi
    rm -rf "$work"
}
trap cleanup EXIT
mkdir "$mnt"
export RESEAL_REPO="$work/vault" RESEAL_KEYRING="$work/keyring.json" RESEAL_STATE="$work/state"

drop_caches() { sync; echo 3 >/proc/sys/vm/drop_caches; }

# Processor seconds count here, for they do not depend on what else the machine does.
backup() {
    local day="$1" frame="$2" level="$3"
    cat "$cache/disk/$day.raw" >/dev/null
    /usr/bin/time -a -o "$work/times" -f '%e %U %S' \
        "$bin/reseal" -q backup web01 "$cache/disk/$day.raw" --frame "$frame" --level="$level"
}

printf '| frame, KiB | zstd level | three backups, s | processor, s | stored, MiB | sequential, MB/s | 4 KiB random, reads/s |\n'
printf '| --- | --- | --- | --- | --- | --- | --- |\n'
# Every frame size at the level that is written, and every level at the size that is written.
for pair in 16:1 32:1 64:1 32:-1 32:2 32:3; do
    frame="${pair%:*}" level="${pair#*:}"
    rm -rf "$work/vault" "$work/state" "$work/keyring.json" "$work/times"
    "$bin/reseal" -q init --no-recovery
    for day in base day1 day2; do backup "$day" "$frame" "$level"; done
    stored="$(find "$work/vault" -type f -printf '%s\n' | awk '{ s += $1 } END { printf "%.1f", s / 1048576 }')"
    "$bin/reseal" mount "$mnt" --background --quiet
    disk="$mnt/web01/latest/disk-0.raw"
    drop_caches
    sequential="$(LC_ALL=C dd if="$disk" of=/dev/null bs=1M count=1000 2>&1 | awk 'END { print $(NF-1), $NF }')"
    drop_caches
    random="$(fio --name=r --filename="$disk" --rw=randread --bs=4k --ioengine=psync --direct=0 --size=1200M \
        --invalidate=1 --time_based --runtime=6 --randseed=7 --output-format=json |
        python3 -c 'import json,sys; print(round(json.load(sys.stdin)["jobs"][0]["read"]["iops"]))')"
    "$bin/reseal" umount "$mnt"
    times="$(awk '{ e += $1; c += $2 + $3 } END { printf "%.2f | %.2f", e, c }' "$work/times")"
    printf '| %s | %s | %s | %s | %s | %s |\n' "$frame" "$level" "$times" "$stored" "$sequential" "$random"
done
