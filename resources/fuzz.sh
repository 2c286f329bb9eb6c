#!/usr/bin/env bash
# Fuzzes bantam: tests/fuzz has the targets, target/fuzz what comes of them.
#     fuzz.sh build                     compiles all targets
#     fuzz.sh run TARGET [SECONDS]      replays what is known, then tries new inputs, for ever or so long
#     fuzz.sh check [SECONDS]           the same with each target, two at a time; 20 seconds each, from the
#                                       same seed (not the same inputs: what a device does has its times)
#     fuzz.sh sanitize [SECONDS]        the same with AddressSanitizer, which takes a compiler that RUSTC_BOOTSTRAP=1 is enough for
#     fuzz.sh try TARGET FILE...        replays inputs, such as the one that a finding was told of
#     fuzz.sh minimize TARGET           has tests/fuzz/corpus keep few inputs that reach all that is reached
#     fuzz.sh list                      names the targets
set -euo pipefail
cd "$(dirname "$0")/.."

host=$(rustc -vV | sed -n 's/^host: //p')
work=$PWD/target/fuzz
programs=$work/$host/debug
# In MiB.
memory=1024
sanitizer=

targets() { for target in tests/fuzz/fuzz_targets/*.rs; do basename "$target" .rs; done; }

build() {
    # As cargo-fuzz has it; no option of these needs a nightly compiler.
    local flags=(--cfg fuzzing -Cpasses=sancov-module ${sanitizer:+"-Zsanitizer=$sanitizer"})
    local option
    for option in sanitizer-coverage-{level=4,inline-8bit-counters,pc-table,trace-compares}; do
        flags+=("-Cllvm-args=-$option")
    done
    # With a --target, build scripts and macros are compiled without the flags.
    RUSTFLAGS="${flags[*]}" CARGO_TARGET_DIR=$work \
        cargo build --quiet --locked --target "$host" --manifest-path tests/fuzz/Cargo.toml --bins --keep-going
}

# An input may take 25 seconds, and the program 1 GiB (with a sanitizer 4). What a target has on the host is in memory.
fuzz() { # target, directories and options
    local target=$1
    shift
    mkdir -p "$work/corpus/$target" "$work/findings" "tests/fuzz/corpus/$target"
    (
        TMPDIR=$(mktemp -d /dev/shm/bantam-fuzz.XXXXXX)
        export TMPDIR
        trap 'rm -rf "$TMPDIR"' EXIT
        fuzz_in "$target" "$@"
    )
}

fuzz_in() {
    local target=$1
    shift
    "$programs/$target" -timeout=25 -rss_limit_mb="$memory" -handle_xfsz=0 -max_len=4096 -len_control=0 \
        -print_final_stats=1 -artifact_prefix="$work/findings/$target-" "$@"
}

run() { # target, seconds
    fuzz "$1" "$work/corpus/$1" "tests/fuzz/corpus/$1" -max_total_time="${2:-0}"
}

repeatable() { # target, seconds
    local new
    new=$(mktemp -d "$work/new.XXXXXX")
    fuzz "$1" "$new" "tests/fuzz/corpus/$1" -seed=1 -max_total_time="$2" && rm -rf "$new"
}

check_one() { # target, seconds
    local log=$work/$1.log
    if ! repeatable "$1" "$2" >"$log" 2>&1; then
        grep -A 60 -m 1 "panicked at\|ERROR: libFuzzer" "$log" >&2 || tail -n 60 "$log" >&2
        echo "fuzz target $1 found something (above); resources/fuzz.sh try $1 $work/findings/$1-..." >&2
        return 1
    fi
    local edges
    edges=$(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' "$log" | tail -n 1)
    echo "$1: $(sed -n 's/^stat::number_of_executed_units: *//p' "$log") inputs, $edges edges" >&2
}

case ${1:-} in
    build) build ;;
    list) targets ;;
    run) build && run "$2" "${3:-}" ;;
    try) build && fuzz "${@:2}" ;;
    check | sanitize)
        if [[ $1 == sanitize ]]; then
            sanitizer=address memory=4096 work=$work-address programs=$work-address/$host/debug
            export RUSTC_BOOTSTRAP=1
            mkdir -p "$work"
        fi
        build
        export -f repeatable fuzz fuzz_in check_one
        export work programs memory
        targets | xargs -P 2 -I '{}' bash -euo pipefail -c "check_one {} ${2:-20}"
        ;;
    minimize)
        build
        small=$(mktemp -d "$work/small.XXXXXX")
        fuzz "$2" -set_cover_merge=1 -use_counters=0 "$small" "tests/fuzz/corpus/$2" "$work/corpus/$2"
        rm -rf "tests/fuzz/corpus/$2" && mv "$small" "tests/fuzz/corpus/$2"
        ;;
    *) sed -n 's/^# \{0,1\}//; 2,10p' "$0" >&2 && exit 2 ;;
esac
