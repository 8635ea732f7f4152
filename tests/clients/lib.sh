# Shared by the real-client scripts: one appliance with a volume, in a directory of its own.
#
#   . tests/clients/lib.sh        sets $work, makes cleanup certain
#   start_appliance               serves group g; $socket is the NBD socket, $tidelog the command line
#   more_config=…                 lines that start_appliance adds to the configuration
#   add_volume v 256M             a volume of group g
#   uri g/v                       its NBD URI
#   start_pair [ADDR ADDR]        two paired nodes, a and b, and the group g on a; `a …` and `b …` are
#                                 their command lines; they listen for hosts on the addresses, too
#   replicate                     g from a to b, until it streams
#   kill_node a; launch_node a    kill -9, and the start after it
#
# RIG_SERVER=nbdkit runs the same script against nbdkit's memory plugin: what fails there is the
# fault of the rig, not of the appliance.

set -eEuo pipefail
trap 'echo "${BASH_SOURCE[0]##*/}, line $LINENO: exit $?: $BASH_COMMAND"' ERR
export PATH=/usr/bin:$PATH:/usr/sbin:/sbin

work=$(mktemp -d "${TMPDIR:-/tmp}/tidelog-client.XXXXXX")
socket=$work/nbd.sock
server_pid=
declare -A node_pids=()
undo=()

# at_end COMMAND: runs at exit, last one first.
at_end() { undo+=("$1"); }

finish() {
    local status=$? index node log
    trap - ERR
    set +e
    for ((index = ${#undo[@]} - 1; index >= 0; index--)); do eval "${undo[index]}"; done
    for node in "${!node_pids[@]}"; do kill_node "$node"; done
    if [ -n "$server_pid" ]; then
        kill -9 "$server_pid" 2>/dev/null
        wait "$server_pid" 2>/dev/null
    fi
    if [ "$status" -ne 0 ]; then
        for log in "$work/serve.log" "$work"/[ab]/serve.log; do
            [ -f "$log" ] || continue
            echo "-- the last lines of $log"
            tail -n 40 "$log"
        done
    fi
    rm -rf "$work"
    exit "$status"
}
trap finish EXIT

# until_true SECONDS WHAT COMMAND…: polls a condition.
until_true() {
    local deadline=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        if [ "$SECONDS" -ge "$deadline" ]; then
            echo "gave up waiting for $what"
            return 1
        fi
        sleep 0.05
    done
}

listening() {
    kill -0 "$server_pid" || return 1
    if [ -z "${RIG_SERVER:-}" ]; then
        tidelog status
    elif [ -n "${tcp_listen:-}" ]; then
        (: <"/dev/tcp/${tcp_listen%:*}/${tcp_listen#*:}")
    else
        [ -S "$socket" ]
    fi
}

tidelog() { "$TIDELOG" --socket "$work/control.sock" "$@"; }

# launch: starts the server's process in $work; also after kill_appliance. $tcp_listen, an ADDR:PORT,
# is a second way in.
launch() {
    if [ "${RIG_SERVER:-}" = nbdkit ]; then
        if [ -n "${tcp_listen:-}" ]; then
            nbdkit --foreground --ipaddr "${tcp_listen%:*}" --port "${tcp_listen#*:}" memory 256M &
        else
            nbdkit --foreground --unix "$socket" memory 256M &
        fi
    else
        "$TIDELOG" serve --config "$work/tidelog.toml" >>"$work/serve.log" 2>&1 &
    fi
    server_pid=$!
    until_true 30 "the appliance to serve" listening
}

start_appliance() {
    echo "a password of the tests" >"$work/password"
    cat >"$work/tidelog.toml" <<END
node = "a"
data_dir = "$work/data"
${more_config:-}
[control]
socket = "$work/control.sock"
[[nbd]]
listen = "unix:$socket"
END
    if [ -n "${tcp_listen:-}" ]; then
        cat >>"$work/tidelog.toml" <<END
[[nbd]]
listen = "tcp:$tcp_listen"
allow = ["${tcp_listen%.*}.0/24"]
END
    fi
    launch
    if [ -z "${RIG_SERVER:-}" ]; then tidelog group create g; fi
}

kill_appliance() {
    kill -9 "$server_pid"
    wait "$server_pid" 2>/dev/null || true
    rm -f "${RIG_SERVER:+$socket}"
}

add_volume() {
    if [ -z "${RIG_SERVER:-}" ]; then tidelog volume create "g/$1" --size "$2"; fi
}

uri() { echo "nbd+unix:///$1?socket=$socket"; }

# expect WHAT GOT WANTED
expect() {
    if [ "$2" != "$3" ]; then
        echo "$1: got $2, expected $3"
        return 1
    fi
    echo "$1: $2"
}

a() { "$TIDELOG" --socket "$work/a/control.sock" "$@"; }
b() { "$TIDELOG" --socket "$work/b/control.sock" "$@"; }

# own_address PORT: a loopback address that is this process's own.
own_address() { echo "127.$((64 + ($$ >> 16 & 63))).$(($$ >> 8 & 255)).$(($$ & 255)):$1"; }

# node_uri NODE EXPORT
node_uri() { echo "nbd+unix:///$2?socket=$work/$1/nbd.sock"; }

launch_node() {
    "$TIDELOG" serve --config "$work/$1/tidelog.toml" >>"$work/$1/serve.log" 2>&1 &
    node_pids[$1]=$!
    until_true 60 "node $1 to serve" "$1" status
}

kill_node() {
    kill -9 "${node_pids[$1]}" 2>/dev/null || true
    wait "${node_pids[$1]}" 2>/dev/null || true
    unset "node_pids[$1]"
}

start_pair() {
    local node port=20001 listen invite
    for node in a b; do
        mkdir "$work/$node"
        cat >"$work/$node/tidelog.toml" <<END
node = "$node"
data_dir = "$work/$node/data"
[control]
socket = "$work/$node/control.sock"
[peer]
listen = "$(own_address $port)"
[[nbd]]
listen = "unix:$work/$node/nbd.sock"
END
        listen=${1:-}
        if [ -n "$listen" ]; then
            shift
            cat >>"$work/$node/tidelog.toml" <<END
[[nbd]]
listen = "tcp:$listen"
allow = ["${listen%.*}.0/24"]
END
        fi
        port=$((port + 1))
        launch_node $node
    done
    invite=$(a --json peer invite)
    b peer join "$(jq -r .token <<<"$invite")" --address "$(jq -r .address <<<"$invite")"
    a group create g
}

# of NODE FILTER: what a node's status says of the group.
of() { "$1" --json status g | jq -r ".groups[0] | $2"; }

replicates() { [ "$(of a '.peers[0].replication_state')" = streaming ]; }
replicate() {
    until_true 60 "a and b to be connected" peered
    a replicate g --to b
    until_true 60 "b to follow" replicates
}
peered() { [ "$(a --json peer list | grep -c connected)" -gt 0 ]; }

# caught_up: b has durably what a's log holds now.
caught_up() {
    local head
    head=$(of a .log.head_lsn) && [ "$(of b .log.durable_lsn)" -ge "$head" ]
}
