#!/usr/bin/env bash
# Fetches Debian's static busybox, once, and prints its path.
set -euo pipefail

here=$(realpath "$(dirname "$0")")
folder=$(realpath -m "$here/../../target/guest/busybox")
if [[ ! -e $folder/busybox ]]; then
    echo "==> Fetching busybox-static" >&2
    "$here/private-apt.sh" bookworm download busybox-static "$folder/package.deb"
    dpkg --fsys-tarfile "$folder/package.deb" | tar -xO ./bin/busybox >"$folder/busybox.partial"
    chmod 755 "$folder/busybox.partial"
    mv "$folder/busybox.partial" "$folder/busybox"
fi
echo "$folder/busybox"
