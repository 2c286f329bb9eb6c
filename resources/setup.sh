#!/usr/bin/env bash
# Makes a Debian or Ubuntu machine ready to run and test bantam: installs the packages that are missing, and puts
# guest kernels under target/guest and the emulated KVM host's under target/kvm-host.
#     setup.sh quickstart|test
# Nothing is done twice: delete those two folders to fetch and build again.
set -euo pipefail
cd "$(dirname "$0")/.."

step() { echo "==> $*" >&2; }

purpose=$1
hardware_kvm=$(grep -m 1 -owE 'vmx|svm' /proc/cpuinfo || true)

packages=(gcc libc6-dev cpio kmod lz4 xz-utils zstd debian-archive-keyring)
[[ -n $hardware_kvm && $purpose == quickstart ]] || packages+=(qemu-system-x86 e2fsprogs)
[[ $purpose == quickstart ]] || packages+=(
    g++                                                          # libFuzzer
    make flex bison bc libelf-dev                                # the small guest kernel
    iproute2 iputils-ping util-linux strace valgrind shellcheck # tests
    passt dnsmasq-base                                           # networks without root
    erofs-utils umoci skopeo docker-registry debootstrap         # images
    curl openssl                                                 # registries with TLS
    python3                                                      # reads JUnit files
    fio iperf3 git runc procps socat                             # benchmarks
)
missing=()
for package in "${packages[@]}"; do
    [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || missing+=("$package")
done
if ((${#missing[@]})); then
    step "Installing missing packages: ${missing[*]}"
    as_root=(env DEBIAN_FRONTEND=noninteractive)
    if ((EUID != 0)); then
        command -v sudo >/dev/null || { echo "Neither root nor sudo: install these packages first." >&2 && exit 1; }
        as_root=(sudo "${as_root[@]}")
    fi
    install=("${as_root[@]}" apt-get -q install -y --no-install-recommends "${missing[@]}")
    # The package lists may be absent or out of date.
    "${install[@]}" || { "${as_root[@]}" apt-get -q update && "${install[@]}"; }
fi
command -v cargo >/dev/null || { echo "No cargo: install Rust first, from https://rustup.rs" >&2 && exit 1; }

mkdir -p target/guest
exec {lock}>target/guest/lock
flock "$lock"

guest_modules=(virtio_mmio virtio_blk virtio_net virtio-rng vmw_vsock_virtio_transport virtiofs)
host_modules=(
    virtio_pci virtio_console 9p 9pnet_virtio overlay # its own needs
    kvm_amd tun bridge veth vhost_net vhost_vsock virtio_blk ext4
)
kernel() { resources/guest/debian-kernel.sh "$@"; }

kernel target/guest/debian-6.1 bookworm linux-image-cloud-amd64 resources/guest/init "${guest_modules[@]}"
if [[ $purpose == test ]]; then
    kernel target/guest/debian-6.12 trixie linux-image-cloud-amd64 resources/guest/init "${guest_modules[@]}"
    resources/guest-kernel/build.sh
    # At the same time, as each of them uses one CPU for a while.
    resources/guest-kernel/bantam.sh check &
    others=($!)
    resources/guest/debian-root.sh >/dev/null &
    others+=($!)
    gcc -O2 -Wall -static -o target/guest/vsock resources/guest/vsock.c
    resources/guest/tools.sh >/dev/null
    for other in "${others[@]}"; do wait "$other"; done
fi
if [[ -z $hardware_kvm || $purpose == test ]]; then
    kernel target/kvm-host bookworm linux-image-amd64 resources/kvm-host/init "${host_modules[@]}"
    resources/kvm-host/qemu.sh target/kvm-host/qemu
fi
