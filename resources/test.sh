#!/usr/bin/env bash
# Checks all of bantam, on a Debian or Ubuntu machine with Rust: formatting, lints, dependencies, documents, scripts and
# tests. The tests' guests run on the machine's own KVM if it has VT-x or SVM, else in the emulated KVM host.
set -euo pipefail
cd "$(dirname "$0")/.."

step() { echo "==> [${SECONDS}s] $*" >&2; }

step "Set-up"
resources/setup.sh test
for component in rustfmt clippy; do
    cargo "${component/rustfmt/fmt}" --version >/dev/null 2>&1 || rustup component add "$component"
done

step "Formatting"
cargo fmt --check

step "Lints"
cargo clippy --all-targets --locked -- -D warnings
rustfmt --check --edition 2024 src/init/main.rs
# A build lets warnings of other compilers be.
rustc src/init/main.rs --edition=2024 --crate-name=init --emit=metadata -C panic=abort -D warnings -D unsafe_code -o target/init.rmeta

step "Dependencies"
if [[ ! -x target/tools/bin/cargo-deny ]]; then
    step "Building cargo-deny (some minutes, once)"
    # Without optimisation it is fast enough, and built in half the time.
    cargo install --locked --debug --quiet --version ^0.20 --root target/tools --target-dir target/tools/build cargo-deny
    rm -rf target/tools/build
fi
PATH=$PWD/target/tools/bin:$PATH
if cargo deny fetch db 2>target/tools/fetch.log; then
    cargo deny check
else
    tail -n 3 target/tools/fetch.log >&2
    echo "warning: ADVISORIES NOT CHECKED: the advisory database could not be fetched (above)" >&2
    cargo deny check licenses bans sources
fi

step "Documents"
RUSTDOCFLAGS=-Dwarnings cargo doc --no-deps --locked

step "Scripts"
shellcheck .ci/run resources/*.sh resources/*/*.sh resources/*/init

step "Fuzzing"
rustfmt --check --edition 2024 tests/fuzz/src/*.rs tests/fuzz/fuzz_targets/*.rs
resources/fuzz.sh check

step "Tests"
cargo build --locked
cargo test --locked --no-fail-fast

step "All passed"
