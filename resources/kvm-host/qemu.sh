#!/usr/bin/env bash
# Fetches a newer QEMU into FOLDER, without installing it, if this machine's is older than 8.1.
#     qemu.sh FOLDER
# The older ones, with a thread for each CPU, now and then go on running what they translated while the host's kernel was
# patching its own code, an int3, for ever. The kernel does that whenever the first virtual machine comes and the last one
# goes.
set -euo pipefail

folder=$1
here=$(realpath "$(dirname "$0")")

version=$(qemu-system-x86_64 --version | sed -n 's/.*version \([0-9]*\.[0-9]*\).*/\1/p')
[[ ! -e $folder/complete && $(printf '%s\n' 8.1 "$version" | sort -V | head -n 1) != 8.1 ]] || exit 0

echo "==> Fetching a newer QEMU than $version" >&2
rm -rf "$folder"
mkdir -p "$folder"
for package in qemu-system-x86 qemu-system-common qemu-system-data seabios; do
    "$here/../guest/private-apt.sh" bookworm-backports download "$package" "$folder/package.deb"
    dpkg -x "$folder/package.deb" "$folder"
done
rm "$folder/package.deb"
# It is for this release of Debian; elsewhere its libraries may be missing, and the installed one has to do.
if "$folder/usr/bin/qemu-system-x86_64" --version >/dev/null; then touch "$folder/complete"; fi
