#!/usr/bin/env bash
# Makes a small Debian with debootstrap, once, as an archive, and prints its path. It takes root, or sudo.
set -euo pipefail

here=$(realpath "$(dirname "$0")")
folder=$(realpath -m "$here/../../target/guest")
archive=$folder/debian-root.tar
if [[ ! -e $archive ]]; then
    echo "==> Making a Debian root file system (a minute or two, once)" >&2
    as_root=()
    ((EUID == 0)) || as_root=(sudo)
    scratch=$(mktemp -d)
    trap '"${as_root[@]}" rm -rf "$scratch"' EXIT
    # Finds the machine's own mirror.
    "$here/private-apt.sh" bookworm apt-cache policy >/dev/null
    mirror=$(grep -oEm 1 'https?://[^ ]+' "$folder/apt/bookworm/sources.list")
    PATH=$PATH:/usr/sbin:/sbin
    "${as_root[@]}" "$(command -v debootstrap)" --variant=minbase bookworm "$scratch/root" "$mirror" >&2
    # More than half of it is not needed.
    unneeded=(var/cache/apt var/lib/apt/lists usr/share/doc usr/share/locale usr/share/man usr/share/info)
    "${as_root[@]}" tar -C "$scratch/root" -c "${unneeded[@]/#/--exclude=./}" . >"$archive.partial"
    mv "$archive.partial" "$archive"
fi
echo "$archive"
