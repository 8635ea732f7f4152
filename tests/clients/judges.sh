#!/usr/bin/env bash
# File systems and a database as judges: ext4, xfs and SQLite write through nbdfuse to a replicated
# group of two volumes, while images of it are opened at random moments on both nodes. Each must be
# clean for fsck and xfs_repair (after their journals were replayed) and for the database's own check,
# and hold every row whose commit was answered before a bookmark was asked for. The file systems
# replay on a copy; images are read-only.
#
#   JUDGE_ROUNDS=200 tests/clients/judges.sh       the long form; 3 otherwise
#
# needs: nbdfuse nbdcopy fusermount3 losetup mkfs.ext4 fsck.ext4 mkfs.xfs xfs_repair sqlite3 jq
. "$(dirname "$0")/lib.sh"
if [ -n "${RIG_SERVER:-}" ]; then
    echo "nbdkit shows no images"
    exit 0
fi
rounds=${JUDGE_ROUNDS:-3}
fail() {
    echo "$1"
    exit 1
}
start_pair
a group set g window=60s >/dev/null
a volume create g/ext --size 128M
a volume create g/xfs --size 512M
replicate

# disk NAME URI: shows an export as $work/NAME, and that as a loop device.
disk() {
    : >"$work/$1"
    nbdfuse "$work/$1" "$2" &
    local fuse=$!
    at_end "fusermount3 -u $work/$1; wait $fuse"
    until_true 20 "nbdfuse" test -s "$work/$1"
    loop=$(losetup -f --show "$work/$1")
    at_end "losetup -d $loop"
}
mkdir "$work/ext" "$work/xfs" "$work/look" "$work/opened"
disk live-ext "$(node_uri a g/ext)"
mkfs.ext4 -q -E nodiscard,lazy_itable_init=0,lazy_journal_init=0 "$loop"
mount "$loop" "$work/ext"
at_end "umount $work/ext"
disk live-xfs "$(node_uri a g/xfs)"
mkfs.xfs -q -K "$loop"
mount "$loop" "$work/xfs"
at_end "umount $work/xfs"

# Two databases, one on each file system, in both of SQLite's ways to commit; a row's number is noted
# when its commit was answered. Files come and go beside them.
schema='create table t(n integer primary key, body blob); create index i on t(body);'
sqlite3 "$work/ext/db" "pragma journal_mode=delete; $schema" >/dev/null
sqlite3 "$work/xfs/db" "pragma journal_mode=wal; $schema" >/dev/null
sync -f "$work/ext/db" "$work/xfs/db"
write_rows() {
    local n=0
    until [ -e "$work/stop" ]; do
        n=$((n + 1))
        sqlite3 "$work/$1/db" "pragma synchronous=full; insert into t values($n, randomblob(3000));
            update t set body = randomblob(3000) where n = abs(random()) % $n;" || break
        echo $n >"$work/$1.new" && mv "$work/$1.new" "$work/$1.rows"
    done
}
churn() {
    local n=0
    until [ -e "$work/stop" ]; do
        n=$((n + 1))
        mkdir -p "$work/$1/dir$((n % 7))" "$work/$1/dir0"
        head -c $((RANDOM * 3)) /dev/urandom >"$work/$1/dir$((n % 7))/$n" || break
        rm -rf "$work/$1/dir$((n % 7))/$((n - 35))"
        [ $((n % 9)) -ne 0 ] || mv "$work/$1/dir$((n % 7))/$n" "$work/$1/dir0/moved-$n"
        [ $((n % 50)) -ne 0 ] || rm -rf "$work/$1"/dir?
    done
}
for fs in ext xfs; do
    echo 0 >"$work/$fs.rows"
    write_rows $fs >"$work/$fs.out" 2>&1 &
    churn $fs >/dev/null 2>&1 &
done
writers=$(jobs -p | tail -n 4)
# shellcheck disable=SC2086
at_end ": >$work/stop; wait $(echo $writers)"
wrote() { [ "$(cat "$work/ext.rows")" -ge "$1" ] && [ "$(cat "$work/xfs.rows")" -ge "$1" ]; }
until_true 60 "both databases to commit" wrote 5
ready=$SECONDS
is_old() { [ $((SECONDS - ready)) -ge 6 ]; }
until_true 30 "a past to look at" is_old

# judge NODE IMAGE EXT_ROWS XFS_ROWS: checks an image, and that it has that many rows at least.
judge() {
    local node=$1 image=$2 fs rows count copy=$work/copy
    for fs in ext xfs; do
        rows=$3
        [ $fs = ext ] || rows=$4
        nbdcopy "$(node_uri "$node" "g/$fs@$image")" "$copy"
        loop=$(losetup -f --show "$copy")
        # A mount replays the journal; what is left must need no mending.
        if [ $fs = ext ]; then
            mount "$loop" "$work/look" && umount "$work/look"
            fsck.ext4 -fn "$loop" >"$work/fsck.out" 2>&1 || fail "$node, $image: $(cat "$work/fsck.out")"
            mount -o ro "$loop" "$work/look"
        else
            mount -o nouuid "$loop" "$work/look" && umount "$work/look"
            xfs_repair -n "$loop" >"$work/fsck.out" 2>&1 || fail "$node, $image: $(cat "$work/fsck.out")"
            mount -o nouuid "$loop" "$work/look"
        fi
        cp "$work/look"/db* "$work/opened/"
        umount "$work/look"
        losetup -d "$loop"
        rm "$copy"
        sqlite3 "$work/opened/db" "pragma integrity_check; select count(*) from t;
            select coalesce(max(n), 0) from t" >"$work/said"
        rm "$work/opened"/*
        [ "$(head -n 1 "$work/said")" = ok ] || fail "$node, $image, $fs: $(cat "$work/said")"
        count=$(sed -n 2p "$work/said") newest[$fs]=$(sed -n 3p "$work/said")
        [ "$count" = "${newest[$fs]}" ] && [ "$count" -ge "$rows" ] ||
            fail "$node, $image, $fs: $count rows up to ${newest[$fs]}; $rows were committed"
        judged=$((judged + 1))
    done
}
# A judge that fails leaves its copy as it is.
at_end 'mountpoint -q "$work/look" && umount "$work/look"'
at_end 'losetup --list --noheadings --output NAME --associated "$work/copy" | xargs -r losetup -d'
declare -A newest=()
judged=0
for round in $(seq "$rounds"); do
    # A bookmark at a commit, then an image of it on both nodes, which must be the same.
    ext_rows=$(cat "$work/ext.rows") xfs_rows=$(cat "$work/xfs.rows")
    a bookmark g "round-$round" >/dev/null
    until_true 60 "b to have the bookmark" caught_up
    for node in a b; do
        $node image open g --at "round-$round" --name marked >/dev/null
        judge $node marked "$ext_rows" "$xfs_rows"
        [ $node = a ] && at_a="${newest[ext]} ${newest[xfs]}"
        $node image close g@marked >/dev/null
    done
    expect "round $round, newest rows on a and b at the bookmark" "$at_a" \
        "${newest[ext]} ${newest[xfs]}"
    # A random moment of the last seconds, on a random node.
    node=$([ $((RANDOM % 2)) = 0 ] && echo a || echo b)
    $node image open g --at "-$((RANDOM % 4 + 1))s" --name past >/dev/null
    judge $node past 0 0
    $node image close g@past >/dev/null
    $node image open g --at now --name moment >/dev/null
    judge $node moment 0 0
    $node image close g@moment >/dev/null
done
: >"$work/stop"
# shellcheck disable=SC2086
wait $writers || fail "a writer failed: $(cat "$work/ext.out" "$work/xfs.out")"
if grep -iE "error|full|malformed|locked" "$work/ext.out" "$work/xfs.out"; then
    fail "a database could not commit"
fi
echo "$judged volumes of images judged, $(cat "$work/ext.rows") and $(cat "$work/xfs.rows") rows committed"
