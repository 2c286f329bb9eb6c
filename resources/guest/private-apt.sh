#!/usr/bin/env bash
# Reaches one Debian suite through apt with a state folder of its own, so that any user of any Debian or Ubuntu machine
# gets the same packages, and the machine's own apt configuration stays as it is.
#     private-apt.sh SUITE download PACKAGE FILE
#     private-apt.sh SUITE apt-cache ARGUMENT...
set -euo pipefail

suite=$1
command=$2
shift 2
state=$(realpath -m "$(dirname "$0")/../../target/guest/apt/$suite")
keyring=/usr/share/keyrings/debian-archive-keyring.gpg

# The machine's own mirror when it has one: a URI in its sources that ends in /debian or /debian-security.
mirror() {
    local found
    found=$(sed -s 's/#.*//' /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null |
        grep -oE "https?://[^ ]+/$1/?( |\$)" || true)
    head -n 1 <<<"${found:-http://deb.debian.org/$1}"
}

options=(
    -o Dir::Etc::sourcelist="$state/sources.list" -o Dir::Etc::sourceparts=/dev/null
    -o Dir::State="$state" -o Dir::State::status=/dev/null -o Dir::Cache="$state/cache"
    -o Acquire::Languages=none -o APT::Sandbox::User=root
)
if [[ ! -e $state/updated ]]; then
    mkdir -p "$state/lists/partial" "$state/cache/archives/partial"
    type="deb [arch=amd64 target=Packages signed-by=$keyring]"
    echo "$type $(mirror debian) $suite main" >"$state/sources.list"
    [[ $suite == *-backports ]] ||
        echo "$type $(mirror debian-security) $suite-security main" >>"$state/sources.list"
    apt-get "${options[@]}" -q update >&2
    touch "$state/updated"
fi

case $command in
download)
    package=$1 file=$(realpath -m "$2")
    mkdir -p "${file%/*}"
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    cd "$scratch"
    apt-get "${options[@]}" -q download "$package" >&2 || {
        rm "$state/updated"
        echo "private-apt.sh: cannot download $package; the next run reads the list of packages again" >&2
        exit 1
    }
    mv ./*.deb "$file"
    ;;
apt-cache) apt-cache "${options[@]}" "$@" ;;
*) echo "private-apt.sh: unknown command $command" >&2 && exit 2 ;;
esac
