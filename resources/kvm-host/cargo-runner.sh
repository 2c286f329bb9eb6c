#!/usr/bin/env bash
# cargo's runner (.cargo/config.toml): runs an integration test in the emulated KVM host when this machine cannot run
# guests itself. All else runs as it is: unit tests, doc tests, `cargo run`, and the integration tests named below.
# KVM_HOST=always sends integration tests there on every machine.
set -euo pipefail

without_guests=(architecture reference)

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
# A host that is stuck is started anew, twice.
export KVM_HOST_TIMEOUT=${KVM_HOST_TIMEOUT:-1500}
for try in 1 2 3; do
    status=0
    "$here/run.sh" "$@" || status=$?
    [[ $status == 124 ]] || exit "$status"
    echo "kvm-host: THE EMULATED HOST WAS STUCK, try $try of 3" >&2
done
exit 124
