#!/usr/bin/env bash
# Measures bantam's release build against QEMU's microvm, with the same kernel, initramfs, memory and devices, one after
# the other in turn, and commands against runc as well; prints tables of medians. docs/BENCHMARKS.md says what is measured and how.
#     run.sh [--quick] [ITEM...]
# Items: start, sizes, restore, density, device, memory, boot, clones, pause, disk, net, vsock, scaling, share, commands, warm, images; all
# without any. `images` needs no KVM, `start`, `restore`, `density` and `device` use the machine's own, if there is one, even where that cannot run a guest's kernel; the others
# need VT-x or SVM, or run in the emulated KVM host. A plot of each item goes to target/bench.
set -euo pipefail
cd "$(dirname "$0")/../.."

step() { echo "==> [${SECONDS}s] $*" >&2; }

quick=
where=
while [[ ${1:-} == --* ]]; do
    case $1 in
    --quick) quick=yes ;;
    --figures) # for its own use: no table, and the items run here
        where=$2
        shift
        ;;
    *) echo "usage: run.sh [--quick] [start|sizes|restore|density|device|memory|boot|clones|pause|disk|net|vsock|scaling|share|commands|warm|images]..." >&2 && exit 2 ;;
    esac
    shift
done
items=("$@")
(($#)) || items=(start sizes restore density device memory boot clones pause disk net vsock scaling share commands warm images)

built=$PWD/target/bench
vmms=(bantam qemu)
bantam=$(realpath -m "${CARGO_TARGET_DIR:-target}")/release/bantam
# The memory of a large guest, and how much of it one fills, in MiB. In the emulated host each page takes long.
large=1G full=880 turns=(5 2)
[[ $where != emulated ]] || large=256M full=170 turns=(3 1)
tiny=$PWD/target/guest/tiny/vmlinux
debian=$PWD/target/guest/debian-6.1/vmlinuz

# Builds all that is measured, and measured with. An initramfs of the kernel's own comes first, then what is added to it.
build() {
    step "Building"
    cargo build --release --locked --quiet
    rm -rf "$built"
    mkdir -p "$built"
    gcc -O2 -o "$built/measure" resources/bench/measure.c
    gcc -nostdlib -static -Wl,-N,-Ttext=0x100000,--build-id=none,--no-warn-rwx-segments -o "$built/idle" resources/bench/idle.S
    resources/guest/bare-metal.sh resources/guest/driver.c "$built/driver"
    local root=$built/root library
    mkdir -p "$root"/{bin,tmp}
    cp resources/bench/init "$root/bench"
    archive "$root" "$built/base.cpio"
    cat target/guest/tiny/initramfs.cpio "$built/base.cpio" >"$built/boot.cpio"
    gcc -O2 -static -pthread -o "$root/bin/disk" resources/bench/disk.c
    gcc -O2 -static -o "$root/bin/share" resources/bench/share.c
    gcc -O2 -static -o "$root/bin/udp" resources/bench/udp.c
    gcc -O2 -static -o "$root/bin/vsock" resources/bench/vsock.c
    local program
    for program in iperf3 git; do
        cp "$(command -v "$program")" "$root/bin/"
        for library in $(ldd "$root/bin/$program" | grep -o '/[^ ]*'); do
            install -D "$library" "$root$library"
        done
    done
    archive "$root" "$built/all.cpio"
    cat target/guest/tiny/initramfs.cpio "$built/all.cpio" >"$built/io.cpio"
    # A root file system for commands, as a folder, an archive, a bundle of runc's, and for QEMU an initramfs.
    local applet commands=$built/commands
    mkdir -p "$commands"/{bin,dev,proc,sys,tmp}
    cp target/guest/busybox/busybox "$commands/bin/"
    for applet in $("$commands/bin/busybox" --list); do
        [[ $applet == busybox ]] || ln -s busybox "$commands/bin/$applet"
    done
    tar -C "$commands" -cf "$built/commands.tar" .
    mkdir "$built/bundle"
    (cd "$built/bundle" && runc spec)
    sed -i -e 's/"terminal": true/"terminal": false/' -e 's|"path": "rootfs"|"path": "../commands"|' \
        -e 's/"sh"$/"sh", "-c", "COMMAND"/' "$built/bundle/config.json"
    cp -a "$commands" "$built/commands-init"
    cp resources/bench/command-init "$built/commands-init/init"
    archive "$built/commands-init" "$built/commands.cpio"
}

archive() { (cd "$1" && find . -mindepth 1 | cpio -o -H newc -R 0:0 --quiet) >"$2"; }

# machine VMM KERNEL INITRD COMMAND_LINE [KIND=VALUE...] sets `command`. Both VMMs get one vCPU ($cpus for others), 128 MiB ($memory), a serial
# console, a virtio-rng, and what KIND adds: disk=FILE, tap=NAME, vsock=SOCKET. QEMU has no device more; it keeps the clock, which
# kernels look for for seconds, and the option ROM, which loads them faster than its firmware does. The command line is
# bantam's default for both, except that QEMU's microvm has no keyboard controller to reboot by. With $vhost, a tap is
# on vhost-net; with $engine, a disk has requests done by that, with $poll, bantam's looks for them for so long; with share=FOLDER it
# starts QEMU's virtiofsd, which ends with the VMM. No INITRD is an empty one.
machine() {
    local vmm=$1 kernel=$2 initrd=$3 text=$4 device acpi=on aio=threads
    shift 4
    if [[ $vmm == bantam ]]; then
        command=("$bantam" run --memory "${memory:-128M}" --kernel "$kernel" ${initrd:+--initrd "$initrd"} --cmdline "$text" ${cpus:+--cpus "$cpus"})
        for device in "$@"; do
            case $device in
            disk=*) command+=(--disk "path=${device#*=},engine=${engine:-sync},poll-us=${poll:-0}") ;;
            tap=*) command+=(--net "$device,vhost=${vhost:-off}") ;;
            vsock=*) command+=(--vsock "cid=3,socket=${device#*=}") ;;
            share=*) command+=(--share "${device#*=}:/mnt") ;;
            esac
        done
        return
    fi
    [[ $kernel != "$tiny" && $kernel != "$built/idle" ]] || acpi=off # they have none, and one finds its devices by the command line
    command=(qemu-system-x86_64 -nodefaults -no-user-config -no-reboot -nographic -serial stdio
        -M "microvm,accel=kvm,acpi=$acpi,pit=off,pic=off,rtc=on,isa-serial=on"
        # kvm_pvm refuses the MSR of that feature.
        -cpu "host,arch-capabilities=off" -smp "${cpus:-1}" -m "${memory:-128M}" -device virtio-rng-device
        -kernel "$kernel" ${initrd:+-initrd "$initrd"} -append "console=ttyS0 reboot=t panic=-1 pci=off $text")
    # The driver knows no legacy interface, and ends QEMU by the latter.
    [[ $kernel != "$built/driver" ]] || command+=(-global virtio-mmio.force-legacy=off -device isa-debug-exit)
    [[ ${engine:-} != io_uring ]] || aio=io_uring
    for device in "$@"; do
        case $device in
        disk=*) command+=(-device "virtio-blk-device,drive=disk"
            -drive "if=none,id=disk,format=raw,cache=writeback,aio=$aio,file=${device#*=}") ;;
        tap=*) command+=(-netdev "tap,id=net,ifname=${device#*=},script=no,downscript=no,vhost=${vhost:-off}"
            -device "virtio-net-device,netdev=net") ;;
        vsock=*) command+=(-device "vhost-vsock-device,guest-cid=3") ;;
        share=*)
            virtiofsd "${device#*=}"
            command+=(-object "memory-backend-memfd,id=memory,size=128M,share=on" -machine memory-backend=memory
                -global virtio-mmio.force-legacy=off # virtiofsd wants it
                -chardev "socket,id=share,path=$built/virtiofsd.socket"
                -device "vhost-user-fs-device,chardev=share,tag=share0")
            ;;
        esac
    done
}

# virtiofsd FOLDER starts QEMU 7's, or the one in Rust that came after it, and waits for its socket.
virtiofsd() {
    local tries daemon=/usr/lib/qemu/virtiofsd source=(-o "source=$1")
    [[ -x $daemon ]] || daemon=/usr/libexec/virtiofsd source=(--shared-dir "$1")
    rm -f "$built/virtiofsd.socket"
    "$daemon" --socket-path="$built/virtiofsd.socket" "${source[@]}" 2>"$built/virtiofsd.log" &
    for ((tries = 0; tries < 100; tries++)); do
        [[ ! -S $built/virtiofsd.socket ]] || return 0
        sleep 0.1
    done
    cat "$built/virtiofsd.log" >&2
    return 1
}

# in_turn ROUNDS QUICK_ROUNDS FUNCTION [ARGUMENT...] calls it for each VMM, round after round.
in_turn() {
    local round vmm rounds=${quick:+$2}
    for ((round = 1; round <= ${rounds:-$1}; round++)); do
        for vmm in "${vmms[@]}"; do
            "$3" "$vmm" "${@:4}" || { echo "run.sh: $vmm failed: $3 ${*:4}" && tail -n 5 "$built/log"; } >&2
        done
    done
}

figure() { printf '%s\t%s\t%s\t%s\t%s\n' "$where" "$2" "$1" "$3" "$item"; }

# measured SECONDS MARKER... runs `command` with measure(1), and keeps what the guest says in the log.
measured() { "$built/measure" "$@" -- "${command[@]}" </dev/null 2>"$built/log"; }

start() {
    step "exec to the first KVM_RUN"
    figure bantam "release binary, MiB (budget 3)" "$(stat -L -c %s "$bantam" | awk '{ print $1 / 2 ^ 20 }')"
    figure qemu "release binary, MiB (budget 3)" \
        "$(stat -L -c %s "$(command -v qemu-system-x86_64)" | awk '{ print $1 / 2 ^ 20 }')"
    in_turn 1 1 start_calls
    in_turn 31 11 start_time "$tiny" "17 MB ELF kernel (budget 5)"
    in_turn 7 3 start_time "$debian" "14 MB bzImage"
    vmms=(bantam)
    in_turn 7 3 start_unpacked
    in_turn 11 3 start_cached
    in_turn 31 11 start_api
    vmms=(bantam qemu)
}

start_api() {
    rm -f "$built/api.sock"
    command=("$bantam" api --api-sock "$built/api.sock")
    figure "$1" "exec to the API's socket, ms (budget 5)" "$(measured -l 20 | awk '{ print $2 * 1000 }')"
}

start_cached() {
    command=(env "XDG_CACHE_HOME=$built/cache" "$bantam" run --memory 128M --kernel "$tiny" "$built/commands.tar" -- true)
    [[ -e $built/cache ]] || "${command[@]:0:2}" "$bantam" image pull "$built/commands.tar" >/dev/null
    figure "$1" "exec to first KVM_RUN, command in a cached archive, ms" "$(measured -r 20 | awk '{ print $2 * 1000 }')"
}

start_calls() {
    machine "$1" "$tiny" "$built/boot.cpio" ""
    command=(strace -f -o "$built/calls" "${command[@]}")
    measured -r 20 >/dev/null
    figure "$1" "system calls before the first KVM_RUN (budget 120)" \
        "$(awk '/KVM_RUN/ { exit } !/resumed>|---|\+\+\+/ { calls++ } END { print calls }' "$built/calls")"
}

# A kernel that only this machine unpacks, one that is unpacked for others, too, and one that was, each in turn.
start_unpacked() {
    start_time "$1" "$debian" "14 MB bzImage, unpacked for itself"
    rm -rf "$built/kernels"
    start_time "$1" "$debian" "14 MB bzImage, first" "$built/kernels"
    start_time "$1" "$debian" "14 MB bzImage, kept" "$built/kernels"
    rm -f "$built"/kernels/bantam/unpacked/file-*
    start_time "$1" "$debian" "14 MB bzImage, kept, read again" "$built/kernels"
    start_time "$1" "${debian%vmlinuz}vmlinux" "its 53 MB ELF kernel"
}

# start_time VMM KERNEL NAME [FOLDER]: with bantam's cache there, or without one.
start_time() {
    machine "$1" "$2" "$built/boot.cpio" ""
    [[ $1 != bantam ]] || command+=(--report "$built/report.json")
    figure "$1" "exec to first KVM_RUN, $3, ms" "$(XDG_CACHE_HOME=${4:-/dev/null} measured -r 20 | awk '{ print $2 * 1000 }')"
}

sizes() {
    step "exec to the first KVM_RUN of a large machine"
    if awk '/^MemTotal/ { exit $2 > 64 * 2 ^ 20 }' /proc/meminfo; then
        echo "run.sh: no large machine: the host has less than 64 GiB" >&2
        return
    fi
    in_turn 15 3 start_sizes
}

start_sizes() {
    local memory cpus
    for memory in 1G 64G; do start_time "$1" "$tiny" "memory of $memory"; done
    memory=1G
    for cpus in 1 4; do start_time "$1" "$tiny" "vCPUs: $cpus"; done
}

restore() {
    step "exec to the first KVM_RUN of a restored machine"
    local memory
    vmms=(bantam)
    # Whatever the guest does there meanwhile, if it can do anything.
    for memory in 128M 1G 8G; do
        save bantam "$memory" "" "" || return 1
        in_turn 31 11 restore_time "$memory"
    done
    vmms=(bantam qemu)
}

restore_time() {
    restored "$1" "$2"
    figure "$1" "exec to first KVM_RUN, restored, memory of $2, ms (budget 5)" "$(measured -r 20 | awk '{ print $2 * 1000 }')"
}

# save VMM MEMORY MARKER COMMAND_LINE saves a machine when its guest has said MARKER, and ends it.
save() {
    local tries pid status=0 memory=$2 to=$built/saved-$1-$2
    machine "$1" "$tiny" "$built/boot.cpio" "$4"
    rm -rf "$to"
    if [[ $1 == bantam ]]; then
        command+=(--name bench --events "$built/events")
        rm -f "$built/events"
    else
        command+=(-monitor "unix:$built/monitor,server=on,wait=off")
    fi
    XDG_RUNTIME_DIR=$built "${command[@]}" </dev/null >"$built/log" 2>&1 &
    pid=$!
    for ((tries = 0; tries < 1200; tries++)); do
        ! grep -q "$3" "$built/log" || break
        sleep 0.1
    done
    if ((tries == 1200)); then
        status=1
    elif [[ $1 == bantam ]]; then
        for ((tries = 0; tries < 100; tries++)); do
            ! XDG_RUNTIME_DIR=$built "$bantam" snapshot bench "$to" 2>"$built/refused" || break
            sleep 0.1
        done
        [[ -e $to ]] || { cat "$built/refused" >&2 && status=1; }
    else
        # A machine that is stopped first would be stopped when it is restored. The last word comes when the memory is written.
        printf 'migrate "exec:cat >%s"\nquit\n' "$to" | socat -t 120 - "UNIX-CONNECT:$built/monitor" >/dev/null
    fi
    kill "$pid" 2>/dev/null || true
    wait "$pid" || true
    return "$status"
}

# restored VMM MEMORY sets `command` to one that has the saved machine go on.
restored() {
    local memory=$2
    if [[ $1 == bantam ]]; then
        command=("$bantam" restore "$built/saved-$1-$2")
    else
        machine "$1" "$tiny" "$built/boot.cpio" "$ticking"
        command+=(-incoming "exec:cat $built/saved-$1-$2")
    fi
}

# A guest that always says something, to which it is seen that it goes on.
ticking="quiet bench=tick rdinit=/bench"

clones() {
    step "Clones of a saved machine"
    local memory vmm
    for memory in 128M "$large"; do
        for vmm in "${vmms[@]}"; do save "$vmm" "$memory" bench-tick "$ticking"; done
        in_turn "${turns[@]}" goes_on "$memory"
    done
    in_turn 3 1 clone_memory
}

goes_on() {
    restored "$1" "$2"
    figure "$1" "exec to the guest's next line, restored, memory of $2, s" "$(measured 60 bench-tick | awk 'NR == 1 { print $2 }')"
}

# Four of them at once: what each has, of what they share with others its part.
clone_memory() {
    local clone tries pids=()
    restored "$1" 128M
    for clone in 1 2 3 4; do
        "${command[@]}" </dev/null >"$built/log-$clone" 2>&1 &
        pids+=($!)
    done
    for clone in 1 2 3 4; do
        for ((tries = 0; tries < 600; tries++)); do
            ! grep -q bench-tick "$built/log-$clone" || break
            sleep 0.1
        done
    done
    sleep 2
    for clone in "${pids[@]}"; do cat "/proc/$clone/smaps_rollup"; done | awk '
        /^Pss:/ { pss += $2 } /^Private_/ { private += $2 } END { print pss / 4096, private / 4096 }' >"$built/rollup"
    kill "${pids[@]}"
    wait "${pids[@]}" || true
    figure "$1" "host memory (PSS) of each of 4 clones, MiB" "$(cut -d ' ' -f 1 "$built/rollup")"
    figure "$1" "of it private, MiB" "$(cut -d ' ' -f 2 "$built/rollup")"
}

density() {
    step "Many machines at once"
    local count pid to=$built/saved-idle tries
    for count in 1 10 100; do in_turn 3 1 crowd "$count"; done
    vmms=(bantam)
    in_turn 1 1 crowd 1000
    rm -rf "$to"
    XDG_RUNTIME_DIR=$built "$bantam" run --memory 128M --kernel "$built/idle" --name bench </dev/null >"$built/log" 2>&1 &
    pid=$!
    for ((tries = 0; tries < 100; tries++)); do
        ! XDG_RUNTIME_DIR=$built "$bantam" snapshot bench "$to" 2>"$built/refused" || break
        sleep 0.1
    done
    kill "$pid"
    wait "$pid" || true
    for count in 10 100 1000; do in_turn 1 1 crowd "$count" clones; done
    vmms=(bantam qemu)
}

# crowd VMM COUNT [clones]: so many machines whose guest has nothing to do, started one by one without waiting. A guest that boots
# says that it runs; of one that is restored bantam does.
crowd() {
    local vmm=$1 count=$2 kind=${3:-machines} word=bench-idle i pid begin end before after cpu said=0 pids=() command
    rm -rf "$built/crowd" && mkdir "$built/crowd"
    if [[ $kind == clones ]]; then
        word='"event":"started"'
        command=("$bantam" restore "$built/saved-idle" --events)
    else
        machine "$vmm" "$built/idle" "" ""
    fi
    before=$(available)
    begin=$EPOCHREALTIME
    for ((i = 0; i < count; i++)); do
        if [[ $kind == clones ]]; then command[4]=$built/crowd/$i.events; fi
        "${command[@]}" </dev/null >"$built/crowd/$i" 2>&1 &
        pids+=($!)
    done
    for ((i = 0; said < count && i < 1200; i++)); do
        sleep 0.05
        said=$(grep -rls "$word" "$built/crowd" | wc -l)
    done
    end=$EPOCHREALTIME
    sleep 5
    after=$(available)
    cpu=$(running "${pids[@]}")
    sleep 10
    cpu=$(($(running "${pids[@]}") - cpu))
    # All are still there.
    kill "${pids[@]}" || said=0
    wait "${pids[@]}" || true
    ((said == count)) || { cat "$built/crowd/0" >"$built/log" && return 1; }
    figure "$vmm" "$count $kind at once: until the last one runs, s" "$(awk "BEGIN { print $end - $begin }")"
    # Of one the host says too little.
    ((count > 1)) || return 0
    figure "$vmm" "$count $kind at once: host memory for each, MiB" "$(awk "BEGIN { print ($before - $after) / 1024 / $count }")"
    figure "$vmm" "$count $kind at once: CPU time of all while they sleep, ms/min" "$(awk "BEGIN { print $cpu / 1e6 * 6 }")"
}

available() { awk '/^MemAvailable/ { print $2 }' /proc/meminfo; }

# The CPU time that processes took so far, in ns.
running() {
    local process
    for process; do cat "/proc/$process/task/"*/schedstat || true; done | awk '{ time += $1 } END { printf "%.0f", time }'
}

pause() {
    step "Pause while a machine is saved"
    vmms=(bantam)
    in_turn 3 1 pause_once
    vmms=(bantam qemu)
}

pause_once() {
    save "$1" "$large" bench-idle "quiet bench=full mebibytes=$full rdinit=/bench" || return 1
    figure "$1" "pause while $large, $full MiB of it in use, is saved, ms" "$(sed 's/.*"elapsed-ms":\([0-9.]*\).*"event":"\([a-z]*\)".*/\2 \1/' "$built/events" |
        awk '$1 == "paused" { begin = $2 } $1 == "resumed" { print $2 - begin }')"
    rm -r "$built/saved-$1-$large"
}

memory() {
    step "Private memory beside the guest's"
    in_turn 3 1 memory_once
    # This changes the whole host.
    [[ $where == emulated ]] || return 0
    local policy=/sys/kernel/mm/transparent_hugepage/enabled before pages
    before=$(sed 's/.*\[\(.*\)\].*/\1/' "$policy")
    for pages in never madvise always; do
        echo "$pages" >"$policy"
        in_turn 3 1 memory_pages "transparent huge pages ($pages)"
    done
    echo "$before" >"$policy"
    echo 64 >/proc/sys/vm/nr_hugepages
    vmms=(bantam)
    in_turn 3 1 memory_pages "reserved huge pages (--hugepages)" --hugepages
    vmms=(bantam qemu)
    echo 0 >/proc/sys/vm/nr_hugepages
}

# memory_pages VMM NAME [FLAG]: a boot, and all that an idle machine has, its guest's memory included.
memory_pages() {
    local pid status=0
    machine "$1" "$tiny" "$built/boot.cpio" "quiet rdinit=/bench"
    command+=("${@:3}")
    measured 60 bench-user-space bench-reboot >"$built/times" || return 1
    figure "$1" "$2: exec to user space, s" "$(awk 'NR == 1 { print $2 }' "$built/times")"
    machine "$1" "$tiny" "$built/boot.cpio" "quiet bench=idle rdinit=/bench"
    command+=("${@:3}")
    start_idle || status=1
    cp "/proc/$pid/smaps_rollup" "$built/rollup"
    kill "$pid"
    wait "$pid" || true
    ((status == 0)) || return 1
    figure "$1" "$2: host memory (PSS) of a guest that has booted, MiB" \
        "$(awk '/^(Pss|Private_Hugetlb):/ { kib += $2 } END { print kib / 1024 }' "$built/rollup")"
    figure "$1" "$2: of it in huge pages, MiB" \
        "$(awk '/^(AnonHugePages|Private_Hugetlb):/ { kib += $2 } END { print kib / 1024 }' "$built/rollup")"
}

# Starts `command` as the process `pid`, and waits until it has said bench-idle and is.
start_idle() {
    local tries
    "${command[@]}" </dev/null >"$built/log" 2>&1 &
    pid=$!
    for ((tries = 0; tries < 600; tries++)); do
        ! grep -q bench-idle "$built/log" || break
        sleep 0.1
    done
    sleep 1
    ((tries < 600))
}

memory_once() {
    local pid status=0
    machine "$1" "$tiny" "$built/boot.cpio" "quiet bench=idle rdinit=/bench"
    start_idle || status=1
    # A while after the boot.
    sleep 10
    cp "/proc/$pid/smaps" "$built/smaps-$1"
    kill "$pid"
    wait "$pid" || true
    ((status == 0)) || return 1
    figure "$1" "private memory, guest idle, MiB (budget 2)" \
        "$(private "$1")"
    figure "$1" "of it written, MiB" \
        "$(private "$1" -v dirty=1)"
}

private() {
    awk -v guest_kib=131072 -v guest_files="$(realpath "$tiny" "$built/boot.cpio")" "${@:2}" -f resources/bench/private.awk "$built/smaps-$1"
}

boot() {
    step "exec to user space, and reboot to exit"
    in_turn 15 3 boot_once "$tiny" "6.1 without modules, ELF"
    in_turn 5 2 boot_once "$debian" "Debian 6.1, bzImage"
}

boot_once() {
    local user_space reboot exit
    machine "$1" "$2" "$built/boot.cpio" "quiet rdinit=/bench"
    measured 60 bench-user-space bench-reboot >"$built/times" || return 1
    { read -r _ user_space && read -r _ reboot && read -r _ exit; } <"$built/times"
    figure "$1" "exec to user space, $3, s" "$user_space"
    figure "$1" "reboot -f to exit, $3, s (budget 0.1)" "$(awk "BEGIN { print $exit - $reboot }")"
}

# image_on_tmpfs MIB makes a file that is whole before it is measured.
image_on_tmpfs() {
    local image
    image=$(mktemp /dev/shm/bantam-bench.XXXXXX)
    dd if=/dev/zero of="$image" bs=1M count="$1" status=none
    echo "$image"
}

device() {
    step "A disk's device, by a driver without a kernel"
    local image=$built/image engine depth poll
    # Not on a tmpfs, which has io_uring do each request on a thread of its own.
    dd if=/dev/zero of="$image" bs=1M count=64 status=none
    for engine in sync io_uring; do
        for depth in 1 32; do in_turn 5 2 device_once "$image" "$depth"; done
    done
    engine=sync poll=50 vmms=(bantam)
    for depth in 1 32; do in_turn 5 2 device_once "$image" "$depth"; done
    vmms=(bantam qemu)
    rm "$image"
}

# With $engine and $poll. Its time is that between two lines of the guest's.
device_once() {
    local depth=$3 requests=${quick:+5000}
    requests=${requests:-50000}
    machine "$1" "$built/driver" "" "depth=$depth requests=$requests" "disk=$2"
    measured 60 bench-begin bench-end >"$built/times" || return 1
    figure "$1" "4 KiB random reads, $depth at once, $engine${poll:+, poll-us=$poll}, ns each" \
        "$(awk -v requests="$requests" '$1 == "bench-begin" { begin = $2 } $1 == "bench-end" { print ($2 - begin) / requests * 1e9 }' "$built/times")"
}

disk() {
    step "Disk"
    local image
    image=$(image_on_tmpfs 256)
    in_turn 5 2 guest_figures disk "disk=$image"
    rm "$image"
}

net() {
    step "Network"
    bench_tap
    iperf3 -s >/dev/null &
    local servers=($!) vhost
    "$built/root/bin/udp" echo 7 &
    servers+=($!)
    for vhost in off on; do
        if [[ $vhost == off || -w /dev/vhost-net ]]; then in_turn 3 2 guest_figures net tap=bench; fi
    done
    kill "${servers[@]}"
    ip link delete bench
}

# A tap of the name that machines have, with the host's address.
bench_tap() {
    ip tuntap add dev bench mode tap
    ip address add 10.0.0.1/24 dev bench
    ip link set bench up
}

vsock() {
    step "Sockets between guest and host"
    local servers=()
    rm -f "$built/vsock_7"
    "$built/root/bin/vsock" serve "$built/vsock_7" &
    servers+=($!)
    if [[ -w /dev/vhost-vsock ]]; then
        "$built/root/bin/vsock" serve 7 &
        servers+=($!)
    else
        echo "run.sh: bantam alone: the host has no /dev/vhost-vsock, which QEMU needs" >&2
        vmms=(bantam)
    fi
    in_turn 5 2 guest_figures vsock "vsock=$built/vsock"
    vmms=(bantam qemu)
    kill "${servers[@]}"
}

scaling() {
    step "More vCPUs"
    local image cpus
    image=$(mktemp /dev/shm/bantam-bench.XXXXXX)
    dd if=/dev/zero of="$image" bs=1M count=64 status=none
    bench_tap
    for cpus in 1 2 4 8; do in_turn 3 1 scaling_once "$image"; done
    ip link delete bench
    rm "$image"
}

# One guest with a disk and a card: when it is in user space, and what it prints.
scaling_once() {
    machine "$1" "$tiny" "$built/io.cpio" "quiet rdinit=/bench bench=scaling seconds=$([[ -n $quick ]] && echo 1 || echo 3)" \
        "disk=$2" tap=bench
    # Its own: one whose client went away is busy for others.
    local server status=0
    iperf3 -s >/dev/null &
    server=$!
    # How it ends is not measured: a guest with several vCPUs takes long to restart where the host has fewer CPUs.
    measured -m 120 bench-user-space bench-reboot >"$built/times" || status=1
    kill "$server"
    wait "$server" || true
    ((status == 0)) || return 1
    figure "$1" "vCPUs: $cpus, exec to user space, s" "$(awk 'NR == 1 { print $2 }' "$built/times")"
    guest_lines "$1" "vCPUs: $cpus, "
}

share() {
    step "Shared folder"
    local folder
    folder=$(mktemp -d /dev/shm/bantam-bench.XXXXXX)
    git -c safe.directory='*' clone --quiet --depth 1 "file://$PWD" "$folder/repository"
    in_turn 3 1 guest_figures share "share=$folder"
    rm -r "$folder"
}

commands() {
    step "A command"
    mountpoint -q /sys/fs/cgroup || mount -t cgroup2 cgroup2 /sys/fs/cgroup
    vmms=(bantam qemu runc)
    in_turn 7 2 command_once
    in_turn 3 1 command_memory
    vmms=(bantam qemu)
}

warm() {
    step "A command in a guest that was saved"
    local image
    # Not from a folder, all of which is looked at before each run.
    image=$(XDG_CACHE_HOME=$built/cache "$bantam" image pull "$built/commands.tar")
    vmms=(bantam)
    # The first run makes the snapshot, unless there is one.
    image_command "$image" --warm bench
    "${command[@]}" >/dev/null
    in_turn 7 2 command_warm "$image"
    vmms=(bantam qemu)
}

# run_command VMM TEXT sets `command` to one that has the VMM run a shell command.
run_command() {
    case $1 in
    bantam) command=("$bantam" run --memory 128M --kernel "$tiny" "$built/commands" -- sh -c "$2") ;;
    qemu) machine qemu "$tiny" "$built/commands.cpio" "quiet rdinit=/init -- \"$2\"" ;;
    runc)
        sed -i "s/\"-c\", .*/\"-c\", \"$2\"/" "$built/bundle/config.json"
        command=(runc run --bundle "$built/bundle" bench)
        ;;
    esac
}

command_once() {
    local first exit
    run_command "$1" "echo bench-first"
    measured 60 bench-first >"$built/times" || return 1
    { read -r _ first && read -r _ exit; } <"$built/times"
    figure "$1" "exec to the command's first byte, s" "$first"
    figure "$1" "exec to exit, s" "$exit"
}

# In turn with a guest that boots.
command_warm() {
    image_command "$2"
    figure "$1" "exec to the command's first byte, booted, s" "$(measured 60 bench-first | awk 'NR == 1 { print $2 }')"
    image_command "$2" --warm bench
    figure "$1" "exec to the command's first byte, from a warm snapshot, s" "$(measured 60 bench-first | awk 'NR == 1 { print $2 }')"
}

image_command() {
    command=(env "XDG_CACHE_HOME=$built/cache" "$bantam" run "${@:2}" --memory 128M --kernel "$tiny" "$1" -- echo bench-first)
}

# What all processes of an instance have, of what they share with others their part.
command_memory() {
    local pid status=0
    run_command "$1" "echo bench-idle; sleep 1000"
    start_idle || status=1
    figure "$1" "host memory (PSS) of a sleeping command, MiB" "$(descendants "$pid" |
        xargs -I {} cat /proc/{}/smaps_rollup | awk '/^Pss:/ { kib += $2 } END { print kib / 1024 }')"
    if [[ $1 == runc ]]; then runc delete --force bench; else kill "$pid"; fi
    wait "$pid" || true
    return "$status"
}

images() {
    step "Images on disk"
    local archive image unpacked=$built/unpacked name="a busybox root"
    for archive in "$built/commands.tar" "$PWD/target/guest/debian-root.tar"; do
        image=$(XDG_CACHE_HOME=$built/cache "$bantam" image pull "$archive")
        rm -rf "$unpacked"
        mkdir "$unpacked"
        # Devices would need root.
        tar -C "$unpacked" -xf "$archive" --no-same-owner --exclude './dev/*'
        figure bantam "$name on disk, MiB" "$(on_disk "$image")"
        figure runc "$name on disk, MiB" "$(on_disk "$unpacked")"
        figure bantam "$name with its layers, gzipped, MiB" "$(on_disk "$image")"
        figure runc "$name with its layers, gzipped, MiB" \
            "$(gzip -c "$archive" | wc -c | awk -v root="$(on_disk "$unpacked")" '{ print root + $1 / 2 ^ 20 }')"
        name="a Debian (minbase)"
    done
}

on_disk() { du -sk "$1" | awk '{ print $1 / 1024 }'; }

# A process and all below it.
descendants() {
    local child
    echo "$1"
    for child in $(pgrep -P "$1"); do descendants "$child"; done
}

# guest_figures VMM WHAT DEVICE: figures that the guest itself prints.
guest_figures() {
    local seconds=${quick:+0.5} size=
    [[ $2 != net ]] || seconds=${quick:+2}
    [[ $2 != share || -z $quick ]] || size="mebibytes=16 files=100"
    machine "$1" "$tiny" "$built/io.cpio" \
        "quiet rdinit=/bench bench=$2 $size seconds=${seconds:-$([[ $2 == net ]] && echo 3 || echo 1)}" "$3"
    measured 120 bench-reboot >/dev/null || return 1
    if [[ $2 == net && $vhost == on ]]; then guest_lines "$1" "vhost-net: "; else guest_lines "$1"; fi
}

# guest_lines VMM [PREFIX]: what a guest has printed as its figures.
guest_lines() {
    local value what
    tr -d '\r' <"$built/log" | grep '^bench: ' | while read -r _ value what; do figure "$1" "${2:-}$what" "$value"; done
}

if [[ -n $where ]]; then
    for item in "${items[@]}"; do "$item"; done
    exit
fi

build
own=(resources/bench/run.sh ${quick:+--quick} --figures)
hardware=$(grep -m 1 -owE 'vmx|svm' /proc/cpuinfo || true)
for item in "${items[@]}"; do
    case $item in
    start | restore | density | device | images) "${own[@]}" own "$item" ;;
    net | scaling) [[ -z $hardware ]] || unshare --user --map-root-user --net "${own[@]}" own "$item" ;;
    *) [[ -z $hardware ]] || "${own[@]}" own "$item" ;;
    esac
done >"$built/figures.own"
: >"$built/figures.emulated"
guests=()
for item in "${items[@]}"; do [[ $item =~ start|restore|density|device|images || -n $hardware ]] || guests+=("$item"); done
if ((${#guests[@]})); then
    step "In the emulated KVM host: ${guests[*]}"
    # Guests have no more than their host.
    [[ ${guests[*]} != *sizes* ]] || export KVM_HOST_MEMORY=80G
    KVM_HOST_CPUS=2 KVM_HOST_TIMEOUT=3600 resources/kvm-host/run.sh "${own[@]}" emulated "${guests[@]}" >"$built/figures.emulated"
fi
cat "$built/figures.own" "$built/figures.emulated" | awk -f resources/bench/table.awk
cat "$built/figures.own" "$built/figures.emulated" | awk -v folder="$built" -f resources/bench/plot.awk
step "Done"
