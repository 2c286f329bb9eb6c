#!/usr/bin/env bash
# Fetches a stock Debian kernel, without installing it, as FOLDER/vmlinuz, the ELF inside it as FOLDER/vmlinux, some of its
# modules as FOLDER/lib/modules/VERSION, and FOLDER/initramfs.cpio to go with them.
#     debian-kernel.sh FOLDER SUITE METAPACKAGE INIT MODULE...
set -euo pipefail

folder=$1 suite=$2 metapackage=$3 init=$4
shift 4
here=$(realpath "$(dirname "$0")")
busybox=$("$here/busybox.sh")

if [[ ! -e $folder/vmlinuz ]]; then
    package=$("$here/private-apt.sh" "$suite" apt-cache depends "$metapackage" |
        awk '/Depends: linux-image-/ && !found++ { print $2 }')
    echo "==> Fetching $package" >&2
    "$here/private-apt.sh" "$suite" download "$package" "$folder/package.deb"
    # Its configuration too, config-VERSION, for `bantam check --kernel`.
    dpkg --fsys-tarfile "$folder/package.deb" | tar -x -C "$folder" --strip-components 2 --wildcards './boot/config-*'
    dpkg --fsys-tarfile "$folder/package.deb" | tar -xO --wildcards './boot/vmlinuz-*' >"$folder/vmlinuz.partial"
    mv "$folder/vmlinuz.partial" "$folder/vmlinuz"
fi
if [[ ! -e $folder/vmlinux ]]; then
    "$here/vmlinux.sh" "$folder/vmlinuz" >"$folder/vmlinux.partial"
    mv "$folder/vmlinux.partial" "$folder/vmlinux"
fi
if [[ -z $(find "$folder/lib" -name 'virtio_net.ko*' 2>/dev/null) ]]; then
    # What `bantam run` needs for a command.
    rm -rf "${folder:?}/lib" "$folder/lib.partial"
    mkdir "$folder/lib.partial"
    dpkg --fsys-tarfile "$folder/package.deb" | tar -x -C "$folder/lib.partial" --transform 's,^\./usr/,./,' --wildcards \
        '*/modules.builtin' '*/kernel/lib' '*/kernel/crypto' '*/kernel/net/vmw_vsock' '*/kernel/drivers/virtio' \
        '*/kernel/net/core' '*/kernel/drivers/net/'{virtio_net,net_failover}'.ko*' \
        '*/kernel/drivers/block' '*/kernel/drivers/char/hw_random' '*/kernel/fs/'{overlayfs,erofs,squashfs,fuse}
    mv "$folder/lib.partial/lib" "$folder/lib"
    rmdir "$folder/lib.partial"
fi

recipe=$(cat "$init" "$here/initramfs.sh" | sha256sum; echo "$@")
if [[ ! -e $folder/initramfs.cpio || $(cat "$folder/recipe" 2>/dev/null) != "$recipe" ]]; then
    echo "==> Making $folder/initramfs.cpio" >&2
    tree=$(mktemp -d)
    trap 'rm -rf "$tree"' EXIT
    dpkg -x "$folder/package.deb" "$tree"
    "$here/initramfs.sh" "$folder/initramfs.cpio" "$busybox" "$init" "$tree" "$@"
    echo "$recipe" >"$folder/recipe"
fi
