#!/usr/bin/env bash
# Builds a kernel that is none, loaded at 2 MiB: bare-metal.sh SOURCE TARGET
set -euo pipefail
exec gcc -O2 -Wall -ffreestanding -fno-stack-protector -fno-pic -mno-red-zone -mgeneral-regs-only -fno-strict-aliasing \
    -fno-asynchronous-unwind-tables -fno-tree-loop-distribute-patterns -nostdlib -static -no-pie \
    -Wl,-Ttext-segment=0x200000,--build-id=none,-z,noexecstack -o "$2" "$1"
