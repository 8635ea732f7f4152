#!/usr/bin/env bash
# The kernel's own nbd client, in a User-Mode Linux guest that boots on this machine's root: attach,
# mkfs, mount, write, unmount, fsck; twice, with the appliance killed in between. Server and guest
# meet in a network namespace of their own; kernel-guest.sh is what the guest runs.
# needs: linux.uml nbd-client busybox ip ethtool unshare jq
here=$(cd "$(dirname "$0")" && pwd)
if [ "${IN_NAMESPACE:-}" != yes ]; then
    IN_NAMESPACE=yes exec unshare --net -- bash "$here/kernel.sh"
fi
. "$here/lib.sh"

ip link set lo up
ip tuntap add dev tap0 mode tap
ip addr add 192.0.2.1/24 dev tap0
ip link set tap0 up
# Frames larger than the link would be dropped between tap and guest.
ethtool -K tap0 tx off tso off gso off gro off >/dev/null

tcp_listen=192.0.2.1:10809

# guest WHAT: boots, runs one part of kernel-guest.sh, and halts.
guest() {
    timeout --kill-after=5 120 linux.uml mem=256M quiet uml_dir="$work" umid=guest \
        root=/dev/root rootfstype=hostfs rootflags=/ ro \
        vec0:transport=tap,ifname=tap0,depth=64,gro=1 con=null con0=fd:0,fd:1 \
        init="$here/kernel-guest.sh" "tidelog_part=$1" </dev/null >"$work/guest.out" 2>&1 || true
    sed 's/\r$//' "$work/guest.out"
    grep -q '^GUEST done' "$work/guest.out"
}

start_appliance
add_volume v 256M
guest write
if [ -z "${RIG_SERVER:-}" ]; then
    kill_appliance
    launch
    guest check
fi
