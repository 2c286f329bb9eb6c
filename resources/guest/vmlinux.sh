#!/usr/bin/env bash
# Writes the ELF kernel inside a bzImage to standard output.
#     vmlinux.sh BZIMAGE >VMLINUX
# The header's fields are those of the kernel's Documentation/x86/boot.rst.
set -euo pipefail

image=$1
field() { od -An -tu"$2" -j"$1" -N"$2" "$image" | tr -d ' '; }

setup_sects=$(field 0x1f1 1)
payload_offset=$(field 0x248 4)
payload_length=$(field 0x24c 4)
start=$(((setup_sects + 1) * 512 + payload_offset))
magic=$(od -An -tx1 -j"$start" -N4 "$image" | tr -d ' ')

# All but gzip are followed by four bytes with the unpacked size, which their tools take for damage.
# tail fails when head has what it wants: by SIGPIPE, or by EPIPE where that is ignored.
payload() { { tail -c +$((start + 1)) "$image" 2>/dev/null || :; } | head -c "$((payload_length - $1))"; }
case $magic in
1f8b*) payload 0 | gzip -dc ;;
fd377a58) payload 4 | xz -dc ;;
28b52ffd) payload 4 | zstd -dc ;;
02214c18) payload 4 | lz4 -dc ;;
425a68*) payload 4 | bzip2 -dc ;;
7f454c46) payload 0 ;;
*) echo "vmlinux.sh: $image: unknown compression (magic $magic)" >&2 && exit 1 ;;
esac
