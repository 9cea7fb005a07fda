# The two commands that a newcomer needs are `make demo` and `make test`.

SHELL := /bin/bash
.PHONY: all setup demo test lint bench soak fuzz frames clean

all:
	cargo build --release --workspace

# Installs what is missing; quick where nothing is.
setup:
	tests/scripts/setup.sh

# The main job on a real disk: two backups, a mount, a file from each restore point.
demo: setup
	cargo build --release -p reseal-writer -p reseal-mountfs
	tests/scripts/demo.sh

lint:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings

# What CI runs. The binaries are built first, for the end-to-end tests start them.
test: setup lint
	tests/scripts/debian-disk.sh --small .cache/disk-small
	tests/scripts/debian-disk.sh --guest .cache/disk-guest
	cargo build --workspace
	tests/scripts/lanes.sh

# The comparison with peers; rewrites docs/BENCHMARKS.md.
bench:
	tests/scripts/setup.sh bench
	cargo build --release --workspace
	cargo run --release -p reseal-tests --bin bench

# Frame sizes and zstd levels through the real path; prints the table of docs/FORMAT.md.
frames: setup
	cargo build --release --workspace
	tests/scripts/frames.sh

# The long forms of the model, tamper and crash tests: ten times RESEAL_SOAK as long as in `make test`.
soak: setup
	cargo build --workspace
	RESEAL_SOAK=$${RESEAL_SOAK:-1} cargo test -p reseal-tests --no-fail-fast -- --nocapture

# Decoders against inputs that coverage leads to, FUZZ seconds each.
fuzz:
	tests/scripts/fuzz.sh $${FUZZ:-60}

clean:
	cargo clean
	rm -rf .cache
