#!/usr/bin/env bash
# Runs every test, in two lanes beside each other: those with guest systems, which wait for one core each, and the rest. What fails there is
# run once more by itself, for some look at how long things take; it has to pass then, and is named. Not so what looks for data that is lost
# when things come together badly: that must never fail. Where many fail, it is not the time they take, and running them again would only
# put the end off.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

guests=(live story libvirt recovery_story boot boot_check promotion qemu qemu_agent qemu_crash debian)
never=(model crash copy repair rekey prune prune_beside prune_model prune_zombie bucket_life)
names=$(cargo metadata --no-deps --format-version 1 | python3 -c '
import json, sys
packages = json.load(sys.stdin)["packages"]
print(*sorted({target["name"] for package in packages for target in package["targets"] if "test" in target["kind"]}))')
rest=()
for name in $names; do
    [[ " ${guests[*]} " == *" $name "* ]] || rest+=(--test "$name")
done

# First, so that neither lane waits for what the other one builds.
cargo test --workspace --no-run

logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
cargo test --workspace --no-fail-fast "${guests[@]/#/--test=}" >"$logs/guests" 2>&1 &
lane=$!
failed=()
cargo test --workspace --no-fail-fast --lib --bins "${rest[@]}" 2>&1 | tee "$logs/rest" || failed+=(rest)
wait "$lane" || failed+=(guests)
cat "$logs/guests"
cargo test --workspace --no-fail-fast --doc

again=()
for lane in "${failed[@]}"; do
    # `cargo test` says of each program that failed: "to rerun pass `-p PACKAGE --test NAME`".
    mapfile -t programs < <(sed -n 's/^error: test failed, to rerun pass `-p [^ ]* \(.*\)`$/\1/p' "$logs/$lane" | sort -u)
    # It failed otherwise.
    [[ ${#programs[@]} -gt 0 ]] || exit 1
    again+=("${programs[@]}")
done
if [[ ${#again[@]} -gt 4 ]]; then
    printf 'failed, too many to run them again: %s\n' "${again[*]}"
    df -h . "${TMPDIR:-/tmp}"
    exit 1
fi
for which in "${again[@]}"; do
    if [[ " ${never[*]} " == *" ${which#--test } "* ]]; then
        echo "failed: $which"
        exit 1
    fi
    echo "once more, by itself: $which"
    # shellcheck disable=SC2086 # an option and its value
    cargo test --workspace $which
done
