#!/bin/bash
# fuzz.sh [SECONDS]: each decoder against inputs that coverage leads to, so long each (default 60). What is found lies in
# target/fuzz/NAME-crash-*; the corpus in .cache/fuzz grows from run to run.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
seconds="${1:-60}"
cd "$workspace/tests/fuzz"
# The compiler's own coverage, which needs no nightly one; only for the target, not for build scripts.
export RUSTFLAGS="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1"
target="$(rustc -vV | sed -n 's/^host: //p')"
cargo build --release --target "$target" --target-dir "$workspace/target/fuzz"
for name in wire nbd objects; do
    mkdir -p "$cache/fuzz/$name"
    say "fuzzing $name for $seconds s"
    "$workspace/target/fuzz/$target/release/$name" -max_total_time="$seconds" -max_len=65536 -rss_limit_mb=1024 -timeout=10 \
        -print_final_stats=1 -artifact_prefix="$workspace/target/fuzz/$name-" "$cache/fuzz/$name" 2>&1 | tail -n 12
done
