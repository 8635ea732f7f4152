#!/usr/bin/env bash
# fio with its nbd engine as an integrity test: random sizes on 512-byte alignment, each block with
# a crc32c that is checked on reading, from two clients, and again after kill -9.
# needs: fio
. "$(dirname "$0")/lib.sh"
start_appliance
add_volume v 256M

run() {
    fio --output="$work/fio.out" --ioengine=nbd --uri="$(uri g/v)" --thread --group_reporting --verify_state_save=0 \
        --name=a --offset=0 --size=96M --name=b --offset=128M --size=96M "$@" || {
        cat "$work/fio.out"
        return 1
    }
    grep -E "^ +(read|write):|err=" "$work/fio.out"
}
sizes="--rw=randwrite --bsrange=512-64k --blockalign=512 --iodepth=16 --randseed=7"
# shellcheck disable=SC2086
run $sizes --verify=crc32c --verify_fatal=1 --do_verify=1 --fsync=64
run --rw=randrw --bs=4k --iodepth=32 --number_ios=20000 --verify=crc32c --verify_fatal=1 \
    --verify_backlog=512 --trim_percentage=0
[ -z "${RIG_SERVER:-}" ] || exit 0
run --rw=write --bs=128k --iodepth=8 --verify=crc32c --do_verify=0 --verify_fatal=1
kill_appliance
launch
run --rw=read --bs=128k --iodepth=8 --verify=crc32c --verify_fatal=1 --verify_only
echo "every block of the last pass is there after kill -9"
