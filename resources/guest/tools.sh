#!/usr/bin/env bash
# Builds the programs that check file systems in guests, once, as static ones: pjdfstest and fsx, from crates.io, and
# files.c; journal.c, which writes what is looked for after a crash; and driver.c and hostile.c, kernels of their own. Prints their folder.
set -euo pipefail

here=$(realpath "$(dirname "$0")")
folder=$(realpath -m "$here/../../target/guest/tools")
mkdir -p "$folder"
for program in files devmem journal; do
    gcc -O2 -Wall -static -o "$folder/$program" "$here/$program.c"
done
for kernel in driver hostile; do
    "$here/bare-metal.sh" "$here/$kernel.c" "$folder/$kernel"
done
if [[ ! -e $folder/fsx || ! -e $folder/pjdfstest ]]; then
    echo "==> Building pjdfstest and fsx (some minutes, once)" >&2
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    # With the target named, the flag is not for build scripts, which are not static.
    RUSTFLAGS='-C target-feature=+crt-static -C strip=symbols' \
        cargo install --quiet --locked --target x86_64-unknown-linux-gnu --root "$scratch" --target-dir "$scratch/build" \
        pjdfstest@0.2.2 fsx@0.3.2
    mv "$scratch/bin/"{fsx,pjdfstest} "$folder"
fi
echo "$folder"
