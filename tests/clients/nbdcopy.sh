#!/usr/bin/env bash
# libnbd's nbdcopy: a sparse file in, and out again, over several connections, and after kill -9.
# needs: nbdcopy
. "$(dirname "$0")/lib.sh"
start_appliance
add_volume v 256M

truncate -s 256M "$work/in"
for at in 0 3 64 200; do
    dd if=/dev/urandom of="$work/in" bs=1M seek=$at count=7 conv=notrunc status=none
done
nbdcopy --connections=4 --requests=16 --flush "$work/in" "$(uri g/v)"
nbdcopy --connections=4 "$(uri g/v)" "$work/out"
cmp "$work/in" "$work/out"
echo "out equals in"
[ -z "${RIG_SERVER:-}" ] || exit 0
kill_appliance
launch
nbdcopy "$(uri g/v)" "$work/again"
cmp "$work/in" "$work/again"
echo "out equals in after kill -9"
