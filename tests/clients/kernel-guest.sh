#!/bin/sh
# What the User-Mode Linux guest of kernel.sh runs as its init. The root is the host's, read-only.
# Not busybox's shell: it runs its applets by /proc/self/exe, which is the guest's kernel until /proc
# is mounted.
PATH=/usr/sbin:/usr/bin:/sbin:/bin
export PATH
end() {
    echo "GUEST $1"
    busybox sync
    busybox halt -f
}
must() { "$@" || end "failed: $*"; }

busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
busybox mount -t devtmpfs dev /dev
busybox mount -t tmpfs run /run
busybox mount -t tmpfs mnt /mnt
busybox mkdir /mnt/v
part=$(busybox sed -n 's/.*tidelog_part=\([a-z]*\).*/\1/p' /proc/cmdline)
module=$(busybox find "/usr/lib/uml/modules/$(busybox uname -r)" -name nbd.ko)
must busybox insmod "$module"
ip addr add 192.0.2.2/24 dev vec0
ip link set vec0 up
must nbd-client -N g/v 192.0.2.1 10809 /dev/nbd0 -b 4096
case $part in
write)
    must mkfs.ext4 -q /dev/nbd0
    must mount /dev/nbd0 /mnt/v
    must cp -r /usr/share/common-licenses /mnt/v/licenses
    must dd if=/dev/urandom of=/mnt/v/random bs=1M count=16 conv=fsync status=none
    sha256sum </mnt/v/random >/mnt/v/sum
    must umount /mnt/v
    ;;
check)
    must mount /dev/nbd0 /mnt/v
    sum=$(cat /mnt/v/sum)
    [ "$(sha256sum </mnt/v/random)" = "$sum" ] || end "failed: the file differs after kill -9"
    must diff -r /usr/share/common-licenses /mnt/v/licenses
    # Blocks that are no longer used go back as trims.
    must rm /mnt/v/random
    must fstrim -v /mnt/v
    must umount /mnt/v
    ;;
esac
must fsck.ext4 -fn /dev/nbd0
must nbd-client -d /dev/nbd0
end done
