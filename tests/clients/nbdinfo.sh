#!/usr/bin/env bash
# libnbd's nbdinfo: what an export says of itself, and its map before and after a write.
# needs: nbdinfo nbdcopy jq
. "$(dirname "$0")/lib.sh"
start_appliance
add_volume v 256M

nbdinfo --json "$(uri g/v)" | tee "$work/info.json"
about() { jq -r ".exports[0].\"$1\"" "$work/info.json"; }
expect "protocol" "$(jq -r .protocol "$work/info.json")" newstyle-fixed
expect "structured replies" "$(jq -r .structured "$work/info.json")" true
expect "size" "$(about export-size)" $((256 << 20))
for able in can_flush can_fua can_multi_conn can_trim can_zero; do
    expect "$able" "$(about $able)" true
done
expect "read only" "$(about is_read_only)" false
expect "map context" "$(about contexts | jq -r 'index("base:allocation") != null')" true

nbdinfo --list --json "nbd+unix:///?socket=$socket" >"$work/list.json"
if [ -z "${RIG_SERVER:-}" ]; then
    expect "listed" "$(jq -r '.exports | map(."export-name") | join(" ")' "$work/list.json")" g/v
    expect "preferred block" "$(about block_size_preferred)" 4096
    expect "a missing export" "$(nbdinfo "$(uri g/nothing)" >/dev/null 2>&1 || echo refused)" refused
fi

nbdinfo --map --json "$(uri g/v)" >"$work/map.json"
expect "an empty volume is one hole" "$(jq -c 'map([.offset, .length, .type])' "$work/map.json")" \
    "[[0,$((256 << 20)),3]]"
head -c 1M /dev/urandom >"$work/one"
truncate -s 8M "$work/one"
nbdcopy --destination-is-zero "$work/one" "$(uri g/v)"
nbdinfo --map --json "$(uri g/v)" >"$work/map.json"
data='[.[] | select(.type == 0)] | map(.length) | add'
expect "bytes of data after 1 MiB" "$(jq "$data" "$work/map.json")" $((1 << 20))
expect "the map covers the volume" "$(jq 'map(.length) | add' "$work/map.json")" $((256 << 20))
