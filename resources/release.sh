#!/usr/bin/env bash
# Builds bantam for others, with the list of its dependencies in it, as the same bytes wherever it is built.
#     release.sh               into target/dist
#     release.sh --twice       also builds it in another folder, from nothing, and compares
#     release.sh --list FILE   prints the dependencies that a program tells of, as JSON
set -euo pipefail
cd "$(dirname "$0")/.."

step() { echo "==> [${SECONDS}s] $*" >&2; }

target=x86_64-unknown-linux-gnu
tools=$PWD/target/tools

# The list is a section of the program, compressed by zlib.
list() {
    local section
    section=$(mktemp)
    objcopy --dump-section ".dep-v0=$section" "$1" /dev/null
    python3 -c 'import sys, zlib; print(zlib.decompress(open(sys.argv[1], "rb").read()).decode())' "$section"
    rm "$section"
}

# Builds the source in one folder into another.
build() {
    (
        cd "$1"
        local rust
        rust=$(rustc --print sysroot)
        export CARGO_TARGET_DIR=$2 CARGO_INCREMENTAL=0 PATH=$tools/bin:$PATH
        # Where source, crates and the compiler lie is nobody's business.
        export RUSTFLAGS="--remap-path-prefix=$PWD=bantam --remap-path-prefix=${CARGO_HOME:-$HOME/.cargo}=cargo --remap-path-prefix=$rust=rust"
        cargo auditable build --release --locked --quiet --bin bantam --target "$target"
    )
}

case ${1:-} in
--list)
    list "$2"
    exit
    ;;
'' | --twice) ;;
*) echo "usage: release.sh [--twice | --list FILE]" >&2 && exit 2 ;;
esac

if [[ ! -x $tools/bin/cargo-auditable ]]; then
    step "Building cargo-auditable (a minute, once)"
    cargo install --locked --quiet --version ^0.7 --root "$tools" --target-dir "$tools/build" cargo-auditable
    rm -rf "$tools/build"
fi

step "Building bantam by $(rustc --version), with $(ldd --version | head -n 1)"
build "$PWD" "$PWD/target/release-build"
mkdir -p target/dist
install "target/release-build/$target/release/bantam" target/dist/bantam
(cd target/dist && sha256sum bantam >SHA256SUMS)

if [[ ${1:-} == --twice ]]; then
    step "Building it again, elsewhere"
    elsewhere=$(mktemp -d)
    trap 'rm -rf "$elsewhere"' EXIT
    git ls-files -z | xargs -0 cp --parents -t "$elsewhere"
    build "$elsewhere" "$elsewhere/other/target"
    cmp "target/release-build/$target/release/bantam" "$elsewhere/other/target/$target/release/bantam"
    step "Both are the same"
fi
step "target/dist/bantam: $(stat -c %s target/dist/bantam) bytes, $(list target/dist/bantam | python3 -c 'import json, sys; print(len(json.load(sys.stdin)["packages"]))') crates listed"
