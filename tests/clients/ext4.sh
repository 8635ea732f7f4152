#!/usr/bin/env bash
# A mounted file system without the kernel's nbd: nbdfuse shows the volume as a file, a loop device
# makes it a disk. mkfs, mount, write, unmount, fsck; then the same from an image of the past.
# needs: nbdfuse fusermount3 losetup mkfs.ext4 fsck.ext4 fio
. "$(dirname "$0")/lib.sh"
start_appliance
add_volume v 256M

# disk FILE URI…: shows an export as $work/FILE.
disk() {
    : >"$work/$1"
    nbdfuse "$work/$1" "${@:2}" &
    local fuse=$!
    at_end "fusermount3 -u $work/$1; wait $fuse"
    until_true 20 "nbdfuse" test -s "$work/$1"
}
disk volume "$(uri g/v)"
loop=$(losetup -f --show "$work/volume")
at_end "losetup -d $loop"
mkfs.ext4 -q -E nodiscard "$loop"
mkdir "$work/mnt"
mount "$loop" "$work/mnt"
at_end "mountpoint -q $work/mnt && umount $work/mnt"
cp -r /usr/share/common-licenses "$work/mnt/licenses"
head -c 20M /dev/urandom >"$work/mnt/random"
sum=$(sha256sum <"$work/mnt/random")
mkdir "$work/mnt/many"
for i in $(seq 300); do echo "$i" >"$work/mnt/many/$i"; done
rm -r "$work"/mnt/many/1?
sync -f "$work/mnt"
umount "$work/mnt"
fsck.ext4 -fn "$loop"
if [ -z "${RIG_SERVER:-}" ]; then tidelog bookmark g written --consistency filesystem; fi

mount "$loop" "$work/mnt"
expect "the file after a remount" "$(sha256sum <"$work/mnt/random")" "$sum"
expect "small files" "$(ls "$work/mnt/many" | wc -l)" 290
rm -r "$work/mnt/random" "$work/mnt/licenses"
head -c 30M /dev/urandom >"$work/mnt/other"
umount "$work/mnt"
fsck.ext4 -fn "$loop"
[ -z "${RIG_SERVER:-}" ] || exit 0

tidelog image open g --at written --name past
disk past "$(uri g/v@past)"
past=$(losetup -r -f --show "$work/past")
at_end "losetup -d $past"
fsck.ext4 -fn "$past"
mount -o ro,noload "$past" "$work/mnt"
expect "the file in the image of the bookmark" "$(sha256sum <"$work/mnt/random")" "$sum"
test ! -e "$work/mnt/other"
diff -r /usr/share/common-licenses "$work/mnt/licenses"
umount "$work/mnt"
