#!/usr/bin/env bash
# cargo's runner (.cargo/config.toml): runs an integration test in the emulated KVM host when this machine cannot run
# guests itself. All else runs as it is: unit tests, doc tests, `cargo run`, and the integration tests named below.
# KVM_HOST=always sends integration tests there on every machine.
# Environment: TEST_TIMEOUT, seconds after which tests that run as they are have hung, and are killed (1800);
# KVM_HOST_TIMEOUT, the same of one emulated host (1200).
set -euo pipefail

without_guests=(architecture image kernels reference runner)

here=$(realpath "$(dirname "$0")")
name=$(basename "$1")
name=${name%-*}
tests=$here/../../tests

# The processes that one has started, and those that they have: PID
descendants() {
    local child children
    children=$(cat "/proc/$1/task/"*/children)
    for child in $children; do
        echo "$child"
        descendants "$child"
    done
}

# Kills the process when the time is over, and tells what it was doing: PID PROGRAM
watch() {
    local limit=${TEST_TIMEOUT:-1800}
    # Whatever cannot be told, it is killed.
    set +e
    # One that has ended has no program any more, though whoever started it may wait for our end of its output first.
    while [[ -e /proc/$1/exe ]]; do
        ((SECONDS < limit)) || break
        sleep 0.2
    done
    [[ -e /proc/$1/exe ]] && kill -STOP "$1" || return 0
    {
        echo "cargo-runner: HANGS: $2 has not ended after $limit s (TEST_TIMEOUT), and is killed."
        echo "cargo-runner: Its threads, each with the beginning of the name of its test:"
        cat "/proc/$1/task/"*/comm
        ! command -v gdb >/dev/null || timeout 60 gdb -batch -p "$1" -ex "thread apply all backtrace" 2>/dev/null
    } >&2
    # With the guests that it has.
    mapfile -t children < <(descendants "$1" 2>/dev/null)
    kill -KILL "$1" "${children[@]}"
}

# Becomes the program; one that is a test is watched by a process that is no child of it.
become() {
    # `cargo run` runs as long as it wants to.
    if [[ $1 == */deps/* || $1 == */rustdoctest* ]]; then
        (watch "$$" "$1" </dev/null >/dev/null &)
    fi
    exec "$@"
}

if [[ ! -e $tests/$name.rs && ! -e $tests/$name/main.rs || " ${without_guests[*]} " == *" $name "* ]]; then
    become "$@"
fi
if [[ ${KVM_HOST:-} != always && -r /dev/kvm && -w /dev/kvm ]] && grep -qwE 'vmx|svm' /proc/cpuinfo; then
    become "$@"
fi
export RUST_TEST_THREADS=${RUST_TEST_THREADS:-2}
mapfile -t all < <("$1" --list --format terse | sed -n 's/: test$//p')
if (($# > 1 || ${#all[@]} < 2)); then
    exec "$here/run.sh" "$@"
fi

# Becomes a host that runs tests: LOG TEST...
run() {
    local log=$1
    shift
    exec "$here/run.sh" "$program" --exact "$@" >"$log" 2>&1
}

# Those that did not succeed, once more in a new host, one at a time: STATUS LOG TEST...
# An emulated CPU goes wrong now and then, and with it a guest, or the host, which then ends (125) or stands still (124). A
# test that fails twice fails, and so do several.
again() {
    local status=$1 log=$2 test failed=()
    shift 2
    for test in "$@"; do
        grep -qxF "test $test ... ok" "$log" || grep -qF "test $test ... ignored" "$log" || failed+=("$test")
    done
    if ((status != 124 && status != 125 && (status != 101 || ${#failed[@]} > 2) || ${#failed[@]} == 0)); then
        return "$status"
    fi
    echo "kvm-host: FLAKY: failed once (status $status), and is run again: ${failed[*]}" >&2
    local hosts
    for hosts in 1 2 3; do
        status=0
        RUST_TEST_THREADS=1 "$here/run.sh" "$program" --exact "${failed[@]}" || status=$?
        # No test has failed if only the host has.
        ((status == 125)) || break
        echo "kvm-host: FLAKY: host $hosts of 3 failed" >&2
    done
    return "$status"
}

# All tests: a host has one CPU, so two hosts with half of the tests each.
program=$1
export KVM_HOST_TIMEOUT=${KVM_HOST_TIMEOUT:-1200}
first=() second=()
for index in "${!all[@]}"; do
    if ((index % 2)); then second+=("${all[index]}"); else first+=("${all[index]}"); fi
done
logs=$(mktemp -d)
hosts=()
trap 'rm -r "$logs"' EXIT
trap '((${#hosts[@]} == 0)) || kill "${hosts[@]}" 2>/dev/null; exit 130' INT TERM HUP
touch "$logs/first"
run "$logs/first" "${first[@]}" &
hosts+=($!)
run "$logs/second" "${second[@]}" &
hosts+=($!)
tail -s 0.1 --pid="${hosts[0]}" -f -c +1 "$logs/first" &
statuses=(0 0)
wait "${hosts[0]}" || statuses[0]=$?
wait "${hosts[1]}" || statuses[1]=$?
hosts=()
wait
cat "$logs/second"
status=0
((statuses[0] == 0)) || again "${statuses[0]}" "$logs/first" "${first[@]}" || status=$?
((statuses[1] == 0)) || again "${statuses[1]}" "$logs/second" "${second[@]}" || status=$?
exit "$status"
