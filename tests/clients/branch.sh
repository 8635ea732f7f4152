#!/usr/bin/env bash
# The branch of a split brain is a file system: both nodes serve an ext4 after a promote by force,
# and a file is written on each; the node that yields keeps its own as a branch, which is clean for
# fsck and mounts with its file, and the volume is that of the other node.
# needs: nbdfuse fusermount3 losetup mkfs.ext4 fsck.ext4 jq
. "$(dirname "$0")/lib.sh"
if [ -n "${RIG_SERVER:-}" ]; then
    echo "nbdkit has no second node"
    exit 0
fi
start_pair
a volume create g/v --size 64M
replicate

# disk NODE EXPORT [-r]: shows an export as the loop device $loop, until `no_disk`.
mkdir "$work/mnt"
disk() {
    : >"$work/disk"
    nbdfuse "$work/disk" "$(node_uri "$1" "$2")" &
    fuse=$!
    until_true 20 "nbdfuse" test -s "$work/disk"
    loop=$(losetup ${3:+"$3"} -f --show "$work/disk")
}
no_disk() {
    ! mountpoint -q "$work/mnt" || umount "$work/mnt"
    losetup -d "$loop"
    until_true 20 "the loop device to be free" fusermount3 -u "$work/disk"
    wait "$fuse"
    fuse=
}
at_end '[ -z "${fuse:-}" ] || no_disk'
# write FILE: makes a file and has it on the disk.
write() {
    echo "written as $1" >"$work/mnt/$1"
    sync -f "$work/mnt"
}
# holds NODE EXPORT FILES: what is shown is clean, and has these files.
holds() {
    disk "$1" "$2" -r
    fsck.ext4 -fn "$loop"
    mount -o ro,noload "$loop" "$work/mnt"
    expect "$2 on $1" "$(cd "$work/mnt" && grep -h . [a-z]*_*)" "$(printf 'written as %s\n' $3)"
    no_disk
}

disk a g/v
mkfs.ext4 -q -E nodiscard,lazy_itable_init=0,lazy_journal_init=0 "$loop"
mount "$loop" "$work/mnt"
write before_it
until_true 60 "b to have what a has" caught_up
b promote g --force
state='.peers[0].replication_state'
split() { [ "$(of a "$state") $(of b "$state")" = "split-brain split-brain" ]; }
until_true 60 "the split brain to be told" split
write on_a
no_disk
disk b g/v
mount "$loop" "$work/mnt"
write on_b
no_disk

a resolve g --discard-local
follows() { [ "$(of a .role)" = secondary ] && [ "$(of b "$state")" = streaming ]; }
until_true 60 "a to follow b" follows
a image open g --branch "$(a --json branch list g | jq -r '.branches[].name')" --name kept
holds a g/v@kept "before_it on_a"
holds b g/v "before_it on_b"
# a has b's now.
caught_up_a() { [ "$(of a .log.durable_lsn)" -ge "$(of b .log.head_lsn)" ]; }
until_true 60 "a to have what b has" caught_up_a
a image open g --at now --name latest
holds a g/v@latest "before_it on_b"
