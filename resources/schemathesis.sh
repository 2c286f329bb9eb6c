#!/usr/bin/env bash
# Has schemathesis (PyPI) send requests made from Firecracker's OpenAPI document to `bantam api`, before a machine starts
# and while one runs. Fails at a 5xx, an answer of another shape than the document's, a connection that is closed, one
# that is not answered within 10 seconds, or a bantam that ends.
#     schemathesis.sh DOCUMENT [REQUESTS [BANTAM]]
# About 10000 requests by default. It needs /dev/kvm, Python 3 with venv and, once, access to PyPI.
set -euo pipefail

document=$(realpath "$1")
requests=${2:-10000}
here=$(realpath "$(dirname "$0")/..")
bantam=$(realpath "${3:-$here/target/debug/bantam}")
tools=$here/target/tools/schemathesis
operations=$(grep -cE '^    (get|put|patch):$' "$document")

if [[ ! -x $tools/bin/schemathesis ]]; then
    python3 -m venv "$tools"
    "$tools/bin/pip" install --quiet 'schemathesis==4.32.*'
fi

folder=$(mktemp -d)
processes=()
trap 'kill "${processes[@]}" 2>/dev/null || true; rm -rf "$folder"' EXIT
cd "$folder"
# bantam makes the files that requests name: as root it could make them anywhere.
confined=()
if ((EUID == 0)); then
    # shellcheck disable=SC2016
    confined=(unshare --mount bash -c 'mount --bind . . && mount -o remount,bind,ro / && cd "$PWD" && exec "$@"' confined)
fi

# A kernel of a few bytes, which is idle (sti; hlt; jmp to the hlt), and what leads from a TCP port to the socket.
python3 - <<'PYTHON'
import struct
code = bytes([0xfb, 0xf4, 0xeb, 0xfd])
head = b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 1 << 20, 64, 0, 0, 64, 56, 1, 0, 0, 0)
load = struct.pack("<IIQQQQQQ", 1, 5, 4096, 1 << 20, 1 << 20, len(code), len(code), 4096)
open("kernel", "wb").write((head + load).ljust(4096, b"\0") + code)
open("disk", "wb").write(bytes(1 << 20))
PYTHON
cat >forward.py <<'PYTHON'
import asyncio

async def copy(reader, writer):
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    writer.close()

async def client(reader, writer):
    to = await asyncio.open_unix_connection("api.sock")
    await asyncio.gather(copy(reader, to[1]), copy(to[0], writer))

async def main():
    server = await asyncio.start_server(client, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

asyncio.run(main())
PYTHON
mkfifo fifo
python3 forward.py >fifo 2>forward.log &
processes+=($!)
read -r port <fifo

put() { curl -sS --fail-with-body --unix-socket api.sock -X PUT "http://localhost$1" -d "$2"; }

for phase in before after; do
    "${confined[@]}" "$bantam" api --api-sock api.sock --level Off </dev/null >"$phase.log" 2>&1 &
    server=$!
    processes+=("$server")
    until curl -sf --unix-socket api.sock http://localhost/ >/dev/null; do kill -0 "$server"; done
    if [[ $phase == after ]]; then
        put /boot-source '{"kernel_image_path": "kernel"}'
        put /drives/disk '{"drive_id": "disk", "path_on_host": "disk", "is_root_device": false, "is_read_only": false}'
        put /balloon '{"amount_mib": 8, "deflate_on_oom": true, "stats_polling_interval_s": 1}'
        put /actions '{"action_type": "InstanceStart"}'
    fi
    status=0
    "$tools/bin/schemathesis" --config-file /dev/null run "$document" --url "http://127.0.0.1:$port" \
        --phases examples,coverage,fuzzing --max-examples $((requests / 2 / operations)) --seed 1 \
        --checks not_a_server_error,response_schema_conformance \
        --suppress-health-check all --warnings off --request-timeout 10 --continue-on-failure --no-shrink || status=$?
    if ! kill -0 "$server" 2>/dev/null; then
        echo "bantam has ended:" >&2
        cat "$phase.log" >&2
        exit 1
    fi
    curl -sSf --max-time 10 --unix-socket api.sock http://localhost/ && echo
    kill "$server"
    wait "$server" || true
    ((status == 0)) || exit "$status"
done
