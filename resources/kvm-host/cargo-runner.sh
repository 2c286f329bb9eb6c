#!/usr/bin/env bash
# cargo's runner (.cargo/config.toml): runs an integration test in the emulated KVM host when this machine cannot run
# guests itself. All else runs as it is: unit tests, doc tests, `cargo run`, and the integration tests named below.
# KVM_HOST=always sends integration tests there on every machine.
set -euo pipefail

without_guests=(architecture image kernels reference)

here=$(realpath "$(dirname "$0")")
name=$(basename "$1")
name=${name%-*}
tests=$here/../../tests

if [[ ! -e $tests/$name.rs && ! -e $tests/$name/main.rs || " ${without_guests[*]} " == *" $name "* ]]; then
    exec "$@"
fi
if [[ ${KVM_HOST:-} != always && -r /dev/kvm && -w /dev/kvm ]] && grep -qwE 'vmx|svm' /proc/cpuinfo; then
    exec "$@"
fi
export RUST_TEST_THREADS=${RUST_TEST_THREADS:-2}
mapfile -t all < <("$1" --list --format terse | sed -n 's/: test$//p')
if (($# > 1 || ${#all[@]} < 2)); then
    exec "$here/run.sh" "$@"
fi

# All tests: a host has one CPU, so two hosts with half of the tests each.
first=() second=()
for index in "${!all[@]}"; do
    if ((index % 2)); then second+=("${all[index]}"); else first+=("${all[index]}"); fi
done
output=$(mktemp)
hosts=()
trap 'rm "$output"' EXIT
trap '((${#hosts[@]} == 0)) || kill "${hosts[@]}" 2>/dev/null; exit 130' INT TERM HUP
"$here/run.sh" "$1" --exact "${first[@]}" &
hosts+=($!)
"$here/run.sh" "$1" --exact "${second[@]}" >"$output" 2>&1 &
hosts+=($!)
status=0
for host in "${hosts[@]}"; do
    wait "$host" || status=$?
done
cat "$output"
exit "$status"
