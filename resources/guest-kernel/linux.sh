#!/bin/sh
# Builds a Linux kernel for guests, with everything built in, as FOLDER/vmlinux.
#     linux.sh CONFIG FOLDER [SOURCE]
# SOURCE is a kernel's source as a tar archive; without one it is the newest that Debian's or Ubuntu's package linux-source
# has put into /usr/src. CONFIG is applied over allnoconfig. It is built again when this script, CONFIG or SOURCE changes;
# after an interruption it goes on where it was. JOBS is how many compilers run at once, as many as there are CPUs. With
# CHECK_ONLY=1 nothing is compiled: only whether SOURCE has all options of CONFIG is looked at. With OUTPUT the kernel is copied
# there as well, before another build in FOLDER can replace it.
set -eu

config=$1
folder=$2
source=${3:-}
# About how many files are compiled.
files=1180

fail() {
    echo "linux.sh: $*" >&2
    exit 1
}

missing=
need() { "$@" >/dev/null 2>&1 || missing="$missing $package"; }
for package in gcc make flex bison bc perl; do need command -v "$package"; done
package=binutils need command -v ld
package=xz-utils need command -v xz
package=libc6-dev need test -e /usr/include/stdio.h
package=libelf-dev need test -e /usr/include/libelf.h
if [ -z "$source" ]; then
    # The package's version is in the name. Ubuntu's archive is in a folder of the same name.
    source=$(find /usr/src -maxdepth 2 -name 'linux-source-*.tar.*' 2>/dev/null | sort -V | tail -n 1)
    package=linux-source need test -n "$source"
fi
[ -z "$missing" ] || fail "what builds a kernel is missing; install it first: sudo apt install$missing"
[ -r "$source" ] || fail "cannot read the kernel's source $source"

mkdir -p "$folder"
exec 9>"$folder/lock"
flock -n 9 || {
    echo "==> Waiting for another build in $folder" >&2
    flock 9
}
recipe=$({ cat "$0" "$config" && ls -lL "$source"; } | sha256sum)
deliver() {
    [ -z "${OUTPUT:-}" ] || cp "$folder/vmlinux" "$OUTPUT"
    exit 0
}
if [ "${CHECK_ONLY:-0}$(cat "$folder/recipe" 2>/dev/null)" = "0$recipe" ] && [ -e "$folder/vmlinux" ]; then
    deliver
fi

tree=$folder/source
if [ "$(cat "$tree/unpacked" 2>/dev/null)" != "$recipe" ]; then
    echo "==> Unpacking $source" >&2
    rm -rf "$tree"
    mkdir "$tree"
    tar -xf "$source" -C "$tree" --strip-components=1
    echo "$recipe" >"$tree/unpacked"
fi

export KBUILD_BUILD_USER=bantam KBUILD_BUILD_HOST=bantam KBUILD_BUILD_TIMESTAMP='Thu Jan  1 00:00:00 UTC 1970'
log=$folder/build.log
make -s -C "$tree" allnoconfig KCONFIG_ALLCONFIG="$(realpath "$config")" >"$log" 2>&1 || fail "see $log"
# What is below this line of the configuration depends on the kernel's version.
sed '/^# Some versions/,$d' "$config" | grep '^CONFIG_' | while read -r option; do
    grep -qxF "$option" "$tree/.config" || fail "this kernel has no $option"
done

if [ "${CHECK_ONLY:-0}" = 1 ]; then
    rm -rf "$tree"
    exit 0
fi

echo "==> Compiling Linux $(make -s -C "$tree" kernelversion), which takes minutes" >&2
done=0
rm -f "$folder/failed"
{ make -C "$tree" -j"${JOBS:-$(nproc)}" vmlinux 2>&1 9>&- || echo failed >"$folder/failed"; } | while read -r line; do
    echo "$line" >>"$log"
    case $line in CC* | AS* | HOSTCC*) done=$((done + 1)) ;; *) continue ;; esac
    percent=$((done < files ? done * 100 / files : 99))
    if [ -t 2 ]; then
        printf '\r    %2d%%  %-60.60s' "$percent" "$line" >&2
    elif [ $((done % (files / 5))) = 0 ]; then
        echo "    $percent%" >&2
    fi
done
[ ! -t 2 ] || printf '\r%70s\r' '' >&2
if [ -e "$folder/failed" ]; then
    rm "$folder/failed"
    tail -n 20 "$log" >&2
    fail "the kernel does not compile; see $log"
fi
strip -o "$folder/vmlinux.partial" "$tree/vmlinux"
mv "$folder/vmlinux.partial" "$folder/vmlinux"
echo "$recipe" >"$folder/recipe"
rm -rf "$tree"
deliver
