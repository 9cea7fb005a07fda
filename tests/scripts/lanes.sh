#!/usr/bin/env bash
# Runs every test, in two lanes beside each other: those with guest systems, which wait for one core each, and the rest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

guests=(live story libvirt recovery_story boot boot_check promotion qemu qemu_agent qemu_crash debian)
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

log=$(mktemp)
trap 'rm -f "$log"' EXIT
cargo test --workspace --no-fail-fast "${guests[@]/#/--test=}" >"$log" 2>&1 &
lane=$!
failed=0
cargo test --workspace --no-fail-fast --lib --bins "${rest[@]}" || failed=1
cargo test --workspace --no-fail-fast --doc || failed=1
wait "$lane" || failed=1
cat "$log"
exit "$failed"
