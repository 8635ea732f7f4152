#!/bin/sh
# What the User-Mode Linux guest of attach.sh runs as its init. It says `STEP …` to attach.sh, and
# waits for its word, which comes over the console: attach.sh kills, cuts and promotes meanwhile.
PATH=/usr/sbin:/usr/bin:/sbin:/bin
export PATH
end() {
    busybox cat /mnt/notes/keeper 2>/dev/null
    echo "GUEST $1"
    busybox sync
    busybox halt -f
}
must() { "$@" || end "failed: $*"; }

busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
busybox mount -t devtmpfs dev /dev 2>/dev/null
busybox mount -t tmpfs run /run
busybox mount -t tmpfs mnt /mnt
busybox mkdir /mnt/v /mnt/notes
parameter() { busybox sed -n "s|.*tidelog_$1=\([^ ]*\).*|\1|p" /proc/cmdline; }
tidelog=$(parameter binary)
first=$(parameter first)
second=$(parameter second)
ip link set lo up
ip addr add 192.0.2.2/24 dev vec0
ip link set vec0 up

# What is wrong is told in one line, and nothing is attached.
refused() {
    "$tidelog" attach "$@" >/mnt/notes/said 2>&1 && end "failed: was attached: $*"
    echo "REFUSED $(busybox tail -n 1 /mnt/notes/said)"
}
refused g/v /dev/nbd0 --to "$first"
must busybox insmod "$(busybox find "/usr/lib/uml/modules/$(busybox uname -r)" -name nbd.ko)"
refused g/nothing /dev/nbd0 --to "$first"
refused g/v /dev/nbd0 --to 192.0.2.1:9
refused g/v /dev/null --to "$first"

# As systemd would start it by the unit file.
VOLUME=g/v SERVERS="--to $first --to $second --timeout 2s"
unit=$(busybox sed -n "s|%i|nbd0|g; s|^ExecStart=/usr/bin/tidelog|$tidelog|p" "$(parameter unit)")
attach() { eval "$unit >>/mnt/notes/$1 2>&1 &" && keeper=$!; }
attach keeper
status() { "$tidelog" attach --status --json >/mnt/notes/status 2>/dev/null; }
until_status() {
    for i in $(busybox seq 600); do
        status && busybox grep -q "$1" /mnt/notes/status && return 0
        busybox usleep 50000
    done
    busybox cat /mnt/notes/status
    end "failed: waited for $1"
}
until_status '"state": "attached"'
refused g/v /dev/nbd0 --to "$first"
refused g/other /dev/nbd1 --to "$first"
# What another program attached is left to it.
not_detached() {
    "$tidelog" detach "$1" >/mnt/notes/said 2>&1 && end "failed: detached $1"
    echo "REFUSED $(busybox tail -n 1 /mnt/notes/said)"
}
must nbd-client -N g/v "${first%:*}" "${first#*:}" /dev/nbd1 -R >/dev/null
not_detached /dev/nbd1
must nbd-client -d /dev/nbd1 >/dev/null
must mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 /dev/nbd0
must mount -o errors=panic /dev/nbd0 /mnt/v
not_detached /dev/nbd0

# Synced writes without pause; each is noted after it was answered.
(
    n=0
    while [ ! -e /mnt/notes/stop ]; do
        if [ -e /mnt/notes/pause ]; then
            : >/mnt/notes/paused
            busybox usleep 50000
            continue
        fi
        n=$((n + 1))
        busybox dd if=/dev/urandom of="/mnt/v/$n" bs=4096 count=3 conv=fsync 2>/dev/null || break
        echo "$n $(busybox md5sum <"/mnt/v/$n")" >>/mnt/notes/synced
    done
    echo stopped >/mnt/notes/stopped
) &
synced() { busybox wc -l </mnt/notes/synced; }
: >/mnt/notes/synced
# more WHAT: writes go on after WHAT happened.
more() {
    at=$(($(synced) + 20))
    for i in $(busybox seq 1200); do
        [ "$(synced)" -ge "$at" ] && echo "WENT ON $1: $(synced) synced" && return 0
        [ -e /mnt/notes/stopped ] && break
        busybox usleep 50000
    done
    busybox dmesg | busybox tail -n 20
    end "failed: no more writes after $1"
}
step() {
    echo "STEP $1"
    read -r word
    [ "$word" = "$1" ] || end "failed: heard $word for $1"
}
more attach
step kill
more kill
step cut
until_status '"state": "reconnecting"'
step heal
more cut
# Replication is asynchronous: what is to be there after a promote must have been replicated.
: >/mnt/notes/pause
while [ ! -e /mnt/notes/paused ]; do busybox usleep 50000; done
busybox sync
step failover
busybox rm /mnt/notes/pause
more failover
# The keeper dies; another takes the device up, with what is under way.
busybox kill -9 $keeper
wait $keeper 2>/dev/null
until_status '"state": "no-keeper"'
attach keeper
until_status '"state": "attached"'
more keeper

# The volume grows under the mounted file system: what lies behind the old end is served too.
step grow
grown=$(parameter grown)
for i in $(busybox seq 600); do
    [ "$(busybox blockdev --getsize64 /dev/nbd0)" = "$grown" ] && break
    busybox usleep 50000
done
[ "$(busybox blockdev --getsize64 /dev/nbd0)" = "$grown" ] || end "failed: the device has not grown"
last=$(((grown >> 16) - 16))
dd if=/dev/urandom of=/mnt/notes/block bs=64k count=16 2>/dev/null
must dd if=/mnt/notes/block of=/dev/nbd0 bs=64k seek=$last oflag=direct conv=fsync
dd if=/dev/nbd0 of=/mnt/notes/back bs=64k skip=$last iflag=direct 2>/dev/null
must cmp /mnt/notes/block /mnt/notes/back
must resize2fs /dev/nbd0
more grow

: >/mnt/notes/stop
while [ ! -e /mnt/notes/stopped ]; do busybox usleep 50000; done
must umount /mnt/v
must mount /dev/nbd0 /mnt/v
while read -r n sum _; do
    [ "$(busybox md5sum <"/mnt/v/$n" | busybox cut -d " " -f 1)" = "$sum" ] || end "failed: file $n differs"
done </mnt/notes/synced
echo "all $(synced) synced files are there"
must umount /mnt/v
must fsck.ext4 -fn /dev/nbd0

must "$tidelog" detach /dev/nbd0
wait $keeper || end "failed: the keeper ended with an error"
[ -e /sys/block/nbd0/pid ] && end "failed: the device is still there"
if busybox dmesg | busybox grep -iE "i/o error|journal|ext4-fs (error|warning)"; then
    end "failed: the kernel saw an error"
fi

# By force it ends though it is mounted, and its keeper does not take that for a loss.
attach forced
until_status '"state": "attached"'
must mount /dev/nbd0 /mnt/v
must "$tidelog" detach --force /dev/nbd0
wait $keeper || end "failed: the keeper ended with an error"
busybox grep reconnecting /mnt/notes/forced && end "failed: the keeper would have it live again"
dd if=/dev/nbd0 of=/dev/null bs=4096 count=1 iflag=direct 2>/dev/null && end "failed: the device lives"
end done
