#!/usr/bin/env bash
# The kernel of bantam.config, which `bantam kernel build` compiles, from the source that build.sh has fetched.
#     bantam.sh check    whether that has all options of the configuration, which takes seconds
#     bantam.sh build    target/guest/bantam/vmlinux, which takes minutes: about 6 with two CPUs, for an ignored test
set -euo pipefail

here=$(realpath "$(dirname "$0")")
guest=$(realpath -m "$here/../../target/guest")
folder=$guest/bantam
mkdir -p "$folder"

case $1 in
check) done=$folder/checked ;;
build) done=$folder/built ;;
*) echo "bantam.sh: unknown command $1" >&2 && exit 2 ;;
esac
recipe=$(cat "$here/linux.sh" "$here/bantam.config" | sha256sum)
[[ $(cat "$done" 2>/dev/null) != "$recipe" ]] || exit 0

echo "==> The kernel of bantam.config: $1" >&2
source=$folder/linux-source.tar.xz
trap 'rm -f "$source"' EXIT
dpkg --fsys-tarfile "$guest/tiny/source.deb" | tar -xO ./usr/src/linux-source-6.1.tar.xz >"$source"
# So that an interrupted build is known again.
touch -r "$guest/tiny/source.deb" "$source"
[[ $1 == build ]] || export CHECK_ONLY=1
"$here/linux.sh" "$here/bantam.config" "$folder" "$source"
echo "$recipe" >"$done"
