#!/usr/bin/env bash
# Builds the small guest kernel of tiny.config from Debian's linux-source-6.1, as target/guest/tiny/{bzImage,vmlinux},
# with an initramfs.cpio to go with it. Built again when this script or the configuration changes.
set -euo pipefail

here=$(realpath "$(dirname "$0")")
guest=$here/../guest
folder=$(realpath -m "$here/../../target/guest/tiny")
mkdir -p "$folder"

recipe=$(cat "$here/build.sh" "$here/tiny.config" | sha256sum)
if [[ $(cat "$folder/recipe" 2>/dev/null) != "$recipe" ]]; then
    if [[ ! -e $folder/source.deb ]]; then
        echo "==> Fetching the source of Linux 6.1" >&2
        "$guest/private-apt.sh" bookworm download linux-source-6.1 "$folder/source.deb"
    fi
    echo "==> Building the small guest kernel (some minutes)" >&2
    source=$folder/source
    trap 'rm -rf "$source"' EXIT
    rm -rf "$source"
    mkdir "$source"
    dpkg --fsys-tarfile "$folder/source.deb" | tar -xO ./usr/src/linux-source-6.1.tar.xz |
        tar -xJ -C "$source" --strip-components=1
    export KBUILD_BUILD_USER=bantam KBUILD_BUILD_HOST=bantam KBUILD_BUILD_TIMESTAMP='Thu Jan  1 00:00:00 UTC 1970'
    make -s -C "$source" allnoconfig KCONFIG_ALLCONFIG="$here/tiny.config" >/dev/null
    while read -r option; do
        grep -qxF "$option" "$source/.config" || { echo "build.sh: the kernel has no $option" >&2 && exit 1; }
    done < <(grep '^CONFIG_' "$here/tiny.config")
    make -s -C "$source" -j"$(nproc)" bzImage >"$folder/build.log" 2>&1 || { tail "$folder/build.log" >&2 && exit 1; }
    cp "$source/arch/x86/boot/bzImage" "$folder/bzImage"
    "$guest/vmlinux.sh" "$folder/bzImage" >"$folder/vmlinux"
    echo "$recipe" >"$folder/recipe"
fi

[[ $folder/initramfs.cpio -nt $guest/init && $folder/initramfs.cpio -nt $guest/initramfs.sh ]] ||
    "$guest/initramfs.sh" "$folder/initramfs.cpio" "$("$guest/busybox.sh")" "$guest/init"
