# Shared by the scripts beside it; sourced, never run.
set -euo pipefail

workspace="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
# What is costly to make and safe to keep: disks, other backup tools, traces. Several checkouts may share one.
cache="${RESEAL_CACHE:-$workspace/.cache}"

say() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; }
die() { say "$*"; exit 1; }

# Holds the lock NAME of the cache until the script ends, so that two runs never make the same thing at once.
lock() {
    mkdir -p "$cache"
    exec 9>"$cache/$1.lock"
    flock 9
}
