#!/usr/bin/env bash
# `tidelog attach` in a User-Mode Linux guest: a mounted ext4 outlives kill -9 of the appliance, a cut
# of the network, a failover to the second node, and the death of its own keeper, and grows with its
# volume; no write fails, and each that was synced is there. attach-guest.sh is what the guest runs.
# needs: linux.uml nbd-client mkfs.ext4 resize2fs busybox ip ethtool unshare jq
here=$(cd "$(dirname "$0")" && pwd)
if [ "${IN_NAMESPACE:-}" != yes ]; then
    IN_NAMESPACE=yes exec unshare --net -- bash "$here/attach.sh"
fi
. "$here/lib.sh"
if [ -n "${RIG_SERVER:-}" ]; then
    echo "nbdkit has no second node"
    exit 0
fi

ip link set lo up
ip tuntap add dev tap0 mode tap
ip addr add 192.0.2.1/24 dev tap0
ip link set tap0 up
# Frames larger than the link would be dropped between tap and guest.
ethtool -K tap0 tx off tso off gso off gro off >/dev/null

start_pair 192.0.2.1:10809 192.0.2.1:10810
a volume create g/v --size 256M
replicate

mkfifo "$work/to-guest"
timeout --kill-after=5 280 linux.uml mem=256M quiet uml_dir="$work" umid=guest \
    root=/dev/root rootfstype=hostfs rootflags=/ ro \
    vec0:transport=tap,ifname=tap0,depth=64,gro=1 con=null con0=fd:0,fd:1 \
    init="$here/attach-guest.sh" "tidelog_binary=$TIDELOG" tidelog_first=192.0.2.1:10809 \
    "tidelog_unit=$here/../../contrib/tidelog-attach@.service" \
    tidelog_second=192.0.2.1:10810 tidelog_grown=$((320 << 20)) \
    <"$work/to-guest" >"$work/guest.out" 2>&1 &
guest=$!
at_end "kill $guest 2>/dev/null; wait $guest"
at_end "sed 's/\r\$//' $work/guest.out"
exec 4>"$work/to-guest"
heard() { grep -q "^STEP $1" "$work/guest.out" || ! kill -0 "$guest"; }
# step NAME: waits until the guest is there.
step() {
    until_true 120 "the guest at $1" heard "$1"
    grep -q "^STEP $1" "$work/guest.out"
}
go() { echo "$1" >&4; }

step kill
kill_node a
launch_node a
go kill

step cut
# Both ends keep their sockets; what the guest sends arrives, and no reply does: they go to a hardware
# address that nobody has.
ip neigh replace 192.0.2.2 lladdr 02:00:00:00:00:99 dev tap0 nud permanent
go cut
step heal
ip neigh del 192.0.2.2 dev tap0
go heal

step failover
until_true 60 "b to have what a has" caught_up
kill_node a
b promote g
go failover

step grow
b volume resize g/v --size 320M
go grow
wait "$guest" || true
grep -q '^GUEST done' "$work/guest.out"
said() { grep -q "^REFUSED .*$1" "$work/guest.out" || { echo "nothing was refused with: $1" && return 1; }; }
said "modprobe nbd"
said "g/nothing"
said "Connection refused"
said "/dev/null"
said "another process"
said "nbd-client -d /dev/nbd1"
said "is mounted or held"
