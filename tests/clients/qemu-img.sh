#!/usr/bin/env bash
# qemu's tools: convert in, compare, map, discard and zeroes by qemu-io.
# needs: qemu-img qemu-io jq
. "$(dirname "$0")/lib.sh"
start_appliance
add_volume v 256M
target=$(uri g/v)

truncate -s 256M "$work/in.raw"
dd if=/dev/urandom of="$work/in.raw" bs=64K seek=33 count=100 conv=notrunc status=none
dd if=/dev/urandom of="$work/in.raw" bs=1M seek=250 count=6 conv=notrunc status=none
qemu-img convert -n -f raw -O raw "$work/in.raw" "$target"
qemu-img compare -f raw -F raw "$work/in.raw" "$target"
qemu-img info --output=json -f raw "$target" >"$work/info.json"
expect "virtual size" "$(jq '."virtual-size"' "$work/info.json")" $((256 << 20))

io() { qemu-io -f raw "$@" "$target"; }
io -c "write -P 0xab 1M 64k" -c "flush" -c "read -P 0xab 1M 64k"
io -c "write -P 0xcd 512 512" -c "read -P 0xcd 512 512" -c "read -P 0 0 512"
io -c "write -z 1M 32k" -c "read -P 0 1M 32k" -c "read -P 0xab 1056k 32k"
io -c "write -zu 1M 64k" -c "read -P 0 1M 64k"
io -c "write -f -P 0x11 2M 4k" -c "discard 2M 4k" -c "read -P 0 2M 4k"
io -c "aio_write -P 1 8M 1M" -c "aio_write -P 2 9M 1M" -c "aio_write -P 3 10M 1M" -c "aio_flush" \
    -c "read -P 1 8M 1M" -c "read -P 2 9M 1M" -c "read -P 3 10M 1M"

qemu-img convert -f raw -O qcow2 "$target" "$work/out.qcow2"
qemu-img compare -f qcow2 -F raw "$work/out.qcow2" "$target"
qemu-img map --output=json -f raw "$target" >"$work/map.json"
expect "the map covers the volume" "$(jq 'map(.length) | add' "$work/map.json")" $((256 << 20))
