#!/usr/bin/env bash
# Makes an uncompressed initramfs of busybox, an init script and the kernel modules named, with what those need,
# listed in the order to load them in /modules/order.
#     initramfs.sh OUTPUT BUSYBOX INIT [PACKAGE_TREE MODULE...]
# PACKAGE_TREE is an unpacked kernel package; a module that the kernel has built in is left out.
set -euo pipefail
PATH+=:/usr/sbin:/sbin

output=$1 busybox=$2 init=$3
tree=${4:-}
shift $(($# < 4 ? $# : 4))
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT

mkdir -p "$root"/{bin,dev,proc,sys,tmp,mnt,modules}
cp "$busybox" "$root/bin/busybox"
"$busybox" --list | while read -r applet; do
    [[ $applet == busybox ]] || ln -s busybox "$root/bin/$applet"
done
install -m 755 "$init" "$root/init"

touch "$root/modules/order"
if [[ -n $tree ]]; then
    [[ -e $tree/lib ]] || ln -s usr/lib "$tree/lib"
    release=$(ls "$tree/lib/modules")
    [[ -e $tree/lib/modules/$release/modules.dep.bin ]] || depmod -b "$tree" "$release"
    for module in "$@"; do
        modprobe -d "$tree" -S "$release" --show-depends "$module"
    done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' | while read -r file; do
        name=$(basename "$file")
        case $name in
        *.xz) xz -dc "$file" >"$root/modules/${name%.xz}" ;;
        *.zst) zstd -qdc "$file" >"$root/modules/${name%.zst}" ;;
        *) cp "$file" "$root/modules/" ;;
        esac
        echo "${name%.ko*}.ko" >>"$root/modules/order"
    done
fi

(cd "$root" && find . -mindepth 1 | LC_ALL=C sort | cpio -o -H newc -R 0:0 --quiet) >"$output.partial"
mv "$output.partial" "$output"
