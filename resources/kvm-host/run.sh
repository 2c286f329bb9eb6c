#!/usr/bin/env bash
# Runs a command as root in the emulated KVM host: a virtual machine whose CPU QEMU's TCG emulates with AMD SVM, so that
# /dev/kvm is there, whole, on a machine without VT-x and SVM.
#     run.sh COMMAND [ARGUMENT...]
# The command sees this machine's files under the same paths, the environment and the working folder; what it writes is
# gone afterwards. /tmp, in memory, and /var/tmp, on a disk, are empty. Its output and exit status are ours: status 124 at the time limit, 125 when the
# host itself fails, or stands still. With a terminal on standard input and output the command gets a terminal, else no input.
# Environment: KVM_HOST_TIMEOUT, in seconds (1800); KVM_HOST_MEMORY (7G); KVM_HOST_CPUS (1).
set -euo pipefail

fail() { echo "kvm-host: $1" >&2 && exit 125; }

project=$(realpath "$(dirname "$0")/../..")
files=$project/target/kvm-host
[[ -e $files/vmlinux && -e $files/initramfs.cpio ]] ||
    fail "no kernel in $files: run resources/quickstart.sh, which fetches it"
command -v qemu-system-x86_64 >/dev/null || fail "no qemu-system-x86_64: run resources/quickstart.sh, which installs it"

run=$(mktemp -d)
qemu=
watch=
trap '[[ -z $qemu ]] || kill "$qemu" 2>/dev/null; [[ -z $watch ]] || kill "$watch" 2>/dev/null; rm -rf "$run"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

if [[ -t 0 && -t 1 ]]; then
    streams='<>/dev/hvc0 >&0 2>&1'
    read -r rows columns < <(stty size)
    terminal=(-chardev "stdio,id=terminal,signal=off" -device virtio-serial -device "virtconsole,chardev=terminal")
elif [[ /dev/fd/1 -ef /dev/fd/2 ]]; then
    streams='</dev/null >>/run/kvm-host/stdout 2>&1'
else
    streams='</dev/null >>/run/kvm-host/stdout 2>>/run/kvm-host/stderr'
fi
touch "$run/stdout" "$run/stderr"
truncate -s 1G "$run/disk"
PATH=$PATH:/usr/sbin:/sbin mke2fs -q -t ext4 "$run/disk" || fail "cannot make a file system: run resources/test.sh, which installs e2fsprogs"
echo "$project" >"$run/project"
{
    echo 'mount /dev/vda /var/tmp && chmod 1777 /var/tmp'
    echo '(while :; do touch /run/kvm-host/alive; sleep 5; done) </dev/null >/dev/null 2>&1 &'
    export -p
    printf 'cd %q\n' "$PWD"
    [[ -z ${terminal:-} ]] || echo "stty rows $rows cols $columns </dev/hvc0; setsid -cw \\"
    printf '%q ' "$@"
    printf '%s\n' "$streams" 'echo $? >/run/kvm-host/status'
} >"$run/start"

# QEMU's SVM lets a guest's XSETBV through to the host: no XSAVE, and nothing that builds on it.
cpu=max,xsave=off,avx=off,avx2=off,pku=off,mpx=off
emulator=(qemu-system-x86_64)
if [[ -e $files/qemu/complete ]]; then
    share=$files/qemu/usr/share
    emulator=("$files/qemu/usr/bin/qemu-system-x86_64" -L "$share/qemu" -L "$share/seabios" -L /usr/share/qemu)
fi
# One CPU: when two CPUs run guests at once, QEMU's page table walks go wrong now and then, and a guest or the host itself
# crashes or hangs.
machine=(
    timeout --foreground "${KVM_HOST_TIMEOUT:-1800}"
    "${emulator[@]}" -nodefaults -no-user-config -no-reboot -display none -serial "file:$run/console"
    -machine "q35,memory-backend=memory" -accel tcg -cpu "$cpu" -smp "${KVM_HOST_CPUS:-1}"
    -object "memory-backend-ram,id=memory,reserve=off,size=${KVM_HOST_MEMORY:-7G}"
    -kernel "$files/vmlinux" -initrd "$files/initramfs.cpio" -append "console=ttyS0 panic=-1 mitigations=off no_timer_check quiet"
    -drive "file=$run/disk,format=raw,if=virtio,cache=unsafe"
    -virtfs "local,path=/,mount_tag=root,security_model=none,readonly=on,multidevs=remap"
    -virtfs "local,path=$run,mount_tag=run,security_model=none"
)
# QEMU's CPU sleeps for ever now and then, although its timers go on. A host is given two minutes for a sign of life.
end_if_it_stands_still() {
    local sign
    while kill -0 "$qemu" 2>/dev/null; do
        sign=$(stat -c %Y "$run/alive" 2>/dev/null) || sign=$started
        if ((EPOCHSECONDS - sign > 120)); then
            echo "kvm-host: stands still, and is ended" >&2
            kill "$qemu"
            return
        fi
        read -rt 5 <> <(:) || :
    done
}

ended=0 started=$EPOCHSECONDS
if [[ -n ${terminal:-} ]]; then
    "${machine[@]}" "${terminal[@]}" <&0 &
    qemu=$!
else
    "${machine[@]}" </dev/null >&2 &
    qemu=$!
    tail -s 0.1 --pid="$qemu" -f -c +1 "$run/stdout" &
    tail -s 0.1 --pid="$qemu" -f -c +1 "$run/stderr" >&2 &
fi
end_if_it_stands_still &
watch=$!
wait "$qemu" || ended=$?
qemu=
kill "$watch" 2>/dev/null || :
watch=
wait

[[ $ended != 124 ]] || { echo "kvm-host: time limit of ${KVM_HOST_TIMEOUT:-1800} s reached: $*" >&2 && exit 124; }
[[ -s $run/status ]] || { tail -n 30 "$run/console" >&2 && fail "ended without running the command to its end"; }
exit "$(<"$run/status")"
