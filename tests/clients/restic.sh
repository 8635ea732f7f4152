#!/usr/bin/env bash
# Stock restic on a repository that a backup of the appliance wrote: check --read-data passes, and
# what it restores is the volume.
# needs: restic nbdcopy jq
. "$(dirname "$0")/lib.sh"
if [ -n "${RIG_SERVER:-}" ]; then
    echo "nbdkit makes no backups"
    exit 0
fi
more_config="[[repository]]
name = \"main\"
url = \"$work/repository\"
password_file = \"$work/password\""
start_appliance
add_volume v 64M

truncate -s 64M "$work/in"
dd if=/dev/urandom of="$work/in" bs=1M seek=3 count=9 conv=notrunc status=none
dd if=/dev/urandom of="$work/in" bs=4K seek=14000 count=3 conv=notrunc status=none
nbdcopy --flush "$work/in" "$(uri g/v)"
tidelog repository init main
tidelog job set g nightly --repository main

# backup_made COUNT: runs the job and waits for that many backups.
made() { [ "$(tidelog --json backup list g/nightly | jq '[.backups[] | select(.outcome == "done")] | length')" = "$1" ]; }
tidelog backup run g/nightly
until_true 60 "the first backup" made 1
dd if=/dev/urandom of="$work/in" bs=4K seek=77 count=1 conv=notrunc status=none
nbdcopy --flush "$work/in" "$(uri g/v)"
tidelog backup run g/nightly
until_true 60 "the second backup" made 2
tidelog --json backup list g/nightly | jq -r '.backups[] | "\(.outcome) \(.id) \(.bytes_read) \(.bytes_added)"'

export RESTIC_REPOSITORY=$work/repository RESTIC_PASSWORD_FILE=$work/password
export RESTIC_CACHE_DIR=$work/cache
restic check --read-data
restic snapshots
restic restore latest --target "$work/restored"
find "$work/restored" -type f | sort | head
# The image is a directory of files of 4 MiB, in order.
parts=$(find "$work/restored" -path '*/v/*' -type f ! -name '*.json' | sort)
# shellcheck disable=SC2086
cat $parts >"$work/out"
truncate -s 64M "$work/out"
cmp "$work/in" "$work/out"
echo "what restic restored is the volume"

id=$(tidelog --json backup list g/nightly | jq -r '[.backups[] | select(.outcome == "done")] | sort_by(.time) | last | .id')
tidelog backup restore "$id" --volume v --to "$work/own"
cmp "$work/in" "$work/own"
echo "what tidelog restored is the volume"
