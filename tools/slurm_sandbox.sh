#!/usr/bin/env bash
# A throw-away Slurm cluster on one machine: a real slurmctld, and N nodes that are machines of their own to all who look.
#
#   slurm_sandbox.sh up N [DIR]         start N nodes, n1 to nN (default DIR: $SLURM_SANDBOX, else /var/tmp/megatron_ext_slurm)
#       --cpus C                        CPUs that each node says it has (8); more than the machine has are fine
#       --gpus G                        GPUs that each node says it has (0); nothing is behind them
#       --set KEY=VALUE                 another value in slurm.conf, as KillWait=30, GraceTime=3 or cred_expire=20; may be repeated
#       --share PATH                    a folder below /tmp that every node sees too; may be repeated
#   slurm_sandbox.sh down [DIR]         end it and all that runs on it, or what is left of it; only DIR/log stays
#   slurm_sandbox.sh run [DIR] -- CMD   a command on the head (sinfo, sbatch, squeue, ...), in the present folder
#   slurm_sandbox.sh shell [DIR]        a shell on the head
#   slurm_sandbox.sh on NODE [DIR] -- CMD    a command on a node, in /
#   slurm_sandbox.sh crash|boot NODE [DIR]   power off without a word to anyone; power on
#   slurm_sandbox.sh cut|heal NODE [DIR]     pull the network cable, and all on the node goes on; plug it in
#   slurm_sandbox.sh kill-slurmd|start-slurmd NODE [DIR]     the node's daemon alone: its jobs go on
#   slurm_sandbox.sh stop-controller|start-controller [DIR]  slurmctld alone
#   slurm_sandbox.sh check              whether a cluster can run here: if not, says why, exit code 3
#
# The head and each node have host name, network address, processes, /tmp and /dev/shm of their own; all else of the machine's
# files is what a shared file system is on a real cluster, so DIR and whatever jobs read or write lie outside /tmp. What is
# mounted on the head later appears on every node. There is no way out to other networks, and no accounting: `scontrol show job`
# remembers finished jobs. Partitions: `main`, and `urgent`, whose jobs preempt (requeue) those of `main` after 10 s of grace.
# Clusters in different DIRs do not meet. Needs root and Slurm's packages; tried with Slurm 22.05. Times are short (a dead node
# is noticed after some 15 s, a requeued job waits some 6 s); CPU and memory limits are not enforced.
set -euo pipefail

SELF=$(realpath "${BASH_SOURCE[0]}")
PACKAGES="slurmctld slurmd slurm-client munge iproute2 util-linux"
NETWORK=10.77.0 # of the head's own network namespace: the machine's network does not see it
EXIT_CANNOT_RUN=3
TEMPLATE=${SELF%.sh}.conf

say() { printf '%s\n' "$*"; }
fail() {
    printf 'slurm_sandbox.sh: %s\n' "$*" >&2
    exit "${code:-1}"
}
usage() { sed -n '2,/^set -euo/{/^set/d;s/^# \{0,1\}//;p}' "$SELF"; }

# ---- whether and where

check() {
    local program code=$EXIT_CANNOT_RUN
    [ "$(id -u)" = 0 ] || fail "needs root, who alone may make namespaces (try sudo)"
    for program in slurmctld slurmd srun sbatch scontrol munged ip nsenter unshare; do
        command -v "$program" >/dev/null ||
            fail "$program is missing; on Debian: apt-get update && apt-get install -y --no-install-recommends $PACKAGES"
    done
    unshare --net --mount --pid --uts --ipc --fork sh -c 'ip link add br0 type bridge && ip link add veth1 type veth peer name eth0' ||
        fail "this machine lets root make no namespaces, bridges or veth pairs (a container without privileges?)"
}

set_folder() { # [DIR]
    D=$(realpath -m "${1:-${SLURM_SANDBOX:-/var/tmp/megatron_ext_slurm}}")
    case $D in
        /tmp | /tmp/*) fail "$D lies in /tmp, and every node has a /tmp of its own: choose a DIR elsewhere" ;;
        *[!A-Za-z0-9._/-]*) fail "$D: slurm.conf takes only letters, digits and ._- in a path" ;;
    esac
    [ ${#D} -le 60 ] || fail "$D is longer than 60 letters: the paths of Slurm's sockets would be longer than the kernel takes"
    export SLURM_CONF=$D/slurm.conf
}

# ---- who is who. The last argument of the first process of the head, and of each node, is slurm_sandbox:DIR:NAME.
# A file with process ids would outlive them, and name strangers one day.

carriers() { # NAME: "init PID" for the first process of the namespaces, "other PID" for who waits for it outside
    local file pid words
    for file in /proc/[0-9]*/cmdline; do
        { mapfile -d '' words <"$file"; } 2>/dev/null || continue
        [ ${#words[@]} -gt 0 ] && [ "${words[-1]}" = "slurm_sandbox:$D:$1" ] || continue
        pid=${file#/proc/}
        pid=${pid%/cmdline}
        # its id in each nested namespace, the innermost last
        if grep -qsE '^NSpid:.*\s1$' "/proc/$pid/status"; then say "init $pid"; else say "other $pid"; fi
    done
}

init_of() { carriers "$1" | sed -n 's/^init //p'; }
is_on() { [ -n "$(init_of "$1")" ]; }
is_gone() { [ -z "$(carriers "$1")" ]; }

need_head() { # sets words to put before a command
    local init
    init=$(init_of head)
    [ -n "$init" ] || fail "no cluster is up in $D: slurm_sandbox.sh up N $D"
    # Commands stay among the machine's processes, so that who waits for one can also signal it. Daemons end with the head.
    ON_HEAD=(nsenter --target "$init" --mount --net --uts --)
    AMONG_DAEMONS=(nsenter --target "$init" --mount --net --uts --pid --)
}

need_node() { # NODE
    [[ $1 =~ ^n[1-9][0-9]*$ ]] && [ -d "$D/spool/$1" ] || fail "no node '$1' in $D; there are: $(cd "$D/spool" && echo n*)"
}

need_power() { # NODE; sets words to put before a command
    local init
    need_node "$1"
    init=$(init_of "$1")
    [ -n "$init" ] || fail "$1 is off: slurm_sandbox.sh boot $1 $D"
    ON_NODE=(nsenter --target "$init" --mount --net --uts --ipc --pid --)
}

end() { # NAME: kill -9, and wait until the kernel has ended every process of its namespaces
    local kind pid
    while read -r kind pid; do
        [ "$kind" != init ] || kill -9 "$pid" 2>/dev/null || true # it may just have ended by itself
    done < <(carriers "$1")
    # who waits outside ends after the last process inside
    until_true 30 is_gone "$1" || fail "processes of $1 in $D do not end"
}

until_true() { # SECONDS COMMAND...
    local deadline=$((SECONDS + $1))
    shift
    until "$@"; do
        [ $SECONDS -lt "$deadline" ] || return 1
        sleep 0.02
    done
}

# ---- files

write_hosts() { # NUM_NODES
    local i
    {
        say "127.0.0.1 localhost"
        say "$NETWORK.254 head"
        for ((i = 1; i <= $1; i++)); do say "$NETWORK.$i n$i"; done
    } >"$D/hosts"
    # No DNS from inside: looking a name up backwards would wait for a time-out.
    sed 's/^hosts:.*/hosts: files/' /etc/nsswitch.conf >"$D/nsswitch"
}

write_conf() { # NUM_NODES CPUS GPUS
    local gres="" i
    if [ "$3" -gt 0 ]; then
        gres="Gres=gpu:h100:$3"
        mkdir "$D/dev"
        # Slurm wants a device behind each GPU that it counts, of a name of its own
        for ((i = 0; i < $3; i++)); do ln -s /dev/null "$D/dev/nvidia$i"; done
        say "NodeName=n[1-$1] Name=gpu Type=h100 File=$D/dev/nvidia[0-$(($3 - 1))]" >"$D/gres.conf"
    fi
    say "CgroupPlugin=cgroup/v1" >"$D/cgroup.conf" # looking for the kind fails where /sys/fs/cgroup is absent
    sed "s|{DIR}|$D|g;s|{NETWORK}|$NETWORK|g;s|{NODES}|$1|g;s|{CPUS}|$2|g;s|{GRES}|$gres|g" "$TEMPLATE" >"$SLURM_CONF"
}

set_value() { # KEY=VALUE: the line of that name, or a value inside lines, or a new line
    local key=${1%%=*} value=${1#*=}
    [[ $1 =~ ^[A-Za-z_]+=[^|]*$ ]] || fail "--set $1: give KEY=VALUE"
    if grep -qi "^$key=" "$SLURM_CONF"; then
        sed -i "s|^$key=.*|$key=$value|I" "$SLURM_CONF"
    elif grep -qi "[ ,]$key=" "$SLURM_CONF"; then
        sed -i "s|\([ ,]\)$key=[^ ,]*|\1$key=$value|I" "$SLURM_CONF"
    else
        say "$key=$value" >>"$SLURM_CONF"
    fi
}

make_folder() { # [SHARE...]
    clear_folder
    [ ! -e "$D" ] || [ -z "$(find "$D" -mindepth 1 -maxdepth 1 ! -name log)" ] || fail "$D holds other files: choose a new folder"
    mkdir -p "$D" "$D"/{munge,state,spool,log,machine_tmp}
    chmod 755 "$D" "$D/munge" # munged refuses a socket that others cannot reach
    (umask 377 && head -c 1024 /dev/urandom >"$D/munge/key")
    : >"$D/log/jobcomp.txt"
    : >"$D/shares"
    [ $# = 0 ] || printf '%s\n' "$@" >"$D/shares"
}

clear_folder() { # what `up` made, but for the logs; nothing else
    [[ $(head -1 "$SLURM_CONF" 2>/dev/null) == *slurm_sandbox* ]] || return 0
    (
        cd "$D"
        rm -rf munge state spool dev machine_tmp
        rm -f hosts nsswitch shares head.ready gres.conf cgroup.conf slurmctld.pid slurmd.*.pid slurm.conf
    )
}

# ---- the head

head_init() { # the first process of the head's namespaces; all of the cluster ends with it
    mount --make-rshared / # within these namespaces: what is mounted here appears on the nodes
    mount --bind "$D/hosts" /etc/hosts
    mount --bind "$D/nsswitch" /etc/nsswitch.conf
    [ ! -d /etc/slurm ] || mount --bind "$D" /etc/slurm # for commands without SLURM_CONF
    hostname head
    ip link set lo up
    ip link add br0 type bridge
    ip addr add "$NETWORK.254/24" dev br0
    ip link set br0 up
    munged --key-file="$D/munge/key" --socket="$D/munge/sock" --pid-file="$D/munge/pid" --log-file="$D/log/munged.log" \
        --seed-file="$D/munge/seed"
    slurmctld -f "$SLURM_CONF"
    : >"$D/head.ready"
    stay
}

stay() { # process 1 of a machine: bash buries its orphans while it waits
    sleep infinity &
    wait
}

start_head() {
    # Nothing of who starts the cluster passes to its daemons: neither variables nor open files.
    env -i PATH="$PATH" SLURM_CONF="$SLURM_CONF" setsid unshare --net --mount --pid --uts --fork --kill-child \
        bash "$SELF" head-init "slurm_sandbox:$D:head" </dev/null >"$D/log/head.log" 2>&1 &
    until_true 30 is_ready_or_dead $! || true # the next line tells
    [ -e "$D/head.ready" ] || fail "the head did not start: $(tail -5 "$D/log/head.log")"
    need_head
}

is_ready_or_dead() { [ -e "$D/head.ready" ] || ! kill -0 "$1" 2>/dev/null; }

stop_controller() {
    local pid # within the head's namespace
    [ -e "$D/slurmctld.pid" ] || fail "slurmctld does not run in $D"
    pid=$(cat "$D/slurmctld.pid")
    "${AMONG_DAEMONS[@]}" bash -c "kill $pid"
    until_true 60 has_no_daemon "$pid" || fail "slurmctld does not end"
}

start_controller() {
    "${AMONG_DAEMONS[@]}" slurmctld -f "$SLURM_CONF" </dev/null >>"$D/log/head.log" 2>&1
    until_true 60 controller_answers || fail "slurmctld does not answer: $(tail -5 "$D/log/slurmctld.log")"
}

has_no_daemon() { ! "${AMONG_DAEMONS[@]}" bash -c "kill -0 $1" 2>/dev/null; }
controller_answers() { "${ON_HEAD[@]}" scontrol ping 2>/dev/null | grep -q 'is UP'; }

# ---- nodes

node_init() { # NODE [SHARE...]: the first process of a node's namespaces
    local node=$1 share
    shift
    hostname "$node"
    mount --bind /tmp "$D/machine_tmp" # to take the shares from
    mount -t tmpfs -o mode=1777,size=2g tmpfs /tmp
    mount -t tmpfs -o mode=1777,size=2g tmpfs /dev/shm
    for share in "$@"; do
        mkdir -p "$share"
        mount --bind "$D/machine_tmp/${share#/tmp/}" "$share"
    done
    umount "$D/machine_tmp"
    ip link set lo up
    until ip link set eth0 up 2>/dev/null; do sleep 0.02; done # the cable is plugged in from outside
    ip addr add "$NETWORK.${node#n}/24" dev eth0
    slurmd -f "$SLURM_CONF" -N "$node"
    stay
}

boot() { # NODE...
    local node shares=()
    mapfile -t shares <"$D/shares"
    for node in "$@"; do
        is_gone "$node" || fail "$node is on already"
        env -i PATH="$PATH" SLURM_CONF="$SLURM_CONF" "${AMONG_DAEMONS[@]}" \
            setsid unshare --net --mount --propagation slave --pid --uts --ipc --fork --kill-child --mount-proc \
            bash "$SELF" node-init "${shares[@]}" "slurm_sandbox:$D:$node" </dev/null >>"$D/log/$node.log" 2>&1 &
    done
    for node in "$@"; do
        until_true 30 is_on "$node" || fail "$node did not start: $(tail -5 "$D/log/$node.log")"
        "${ON_HEAD[@]}" ip link add "veth${node#n}" type veth peer name eth0 netns "$(init_of "$node")"
        "${ON_HEAD[@]}" ip link set "veth${node#n}" master br0 up
    done
}

crash() { # NODE
    # The cable first: the kernel says goodbye on the connections of processes that end, a machine without power does not.
    "${ON_HEAD[@]}" ip link set "veth${1#n}" down
    end "$1"
    "${ON_HEAD[@]}" ip link del "veth${1#n}" 2>/dev/null || true # it goes with the node's namespace, sooner or later
}

# ---- up and down

up() { # N [DIR] [options]
    local words=() cpus=8 gpus=0 sets=() shares=() value began=${EPOCHREALTIME/./}
    while [ $# -gt 0 ]; do
        case $1 in
            --cpus | --gpus | --set | --share) [ $# -ge 2 ] || fail "$1 needs a value" ;;&
            --cpus) cpus=$2 && shift ;;
            --gpus) gpus=$2 && shift ;;
            --set) sets+=("$2") && shift ;;
            --share) shares+=("$(realpath "$2")") && shift ;;
            -*) fail "up knows no $1 (see --help)" ;;
            *) words+=("$1") ;;
        esac
        shift
    done
    [ ${#words[@]} = 1 ] || [ ${#words[@]} = 2 ] || fail "up N [DIR] (see --help)"
    [[ ${words[0]} =~ ^[1-9][0-9]?[0-9]?$ && $cpus =~ ^[1-9][0-9]{0,3}$ && $gpus =~ ^[0-9]{1,2}$ && ${words[0]} -le 200 ]] ||
        fail "1 to 200 nodes, at least 1 CPU, 0 to 99 GPUs (see --help)"
    for value in "${shares[@]}"; do [[ $value == /tmp/* ]] || fail "--share $value: nodes see all outside /tmp anyway"; done
    set_folder "${words[1]-}"
    check
    if is_on head; then is_up_already "${words[0]}" && return; fi
    make_folder "${shares[@]}"
    write_hosts "${words[0]}"
    write_conf "${words[0]}" "$cpus" "$gpus"
    for value in "${sets[@]}"; do set_value "$value"; done
    bring_up "${words[0]}"
    value=$(((${EPOCHREALTIME/./} - began) / 1000))
    say "${words[0]} nodes of $cpus CPUs and $gpus GPUs are up in $D after $value ms; try: $0 run $D -- sinfo"
}

is_up_already() { # NUM_NODES
    local nodes=("$D"/spool/n*)
    [ ${#nodes[@]} = "$1" ] || fail "up already in $D, with ${#nodes[@]} nodes instead of $1: slurm_sandbox.sh down $D"
    say "up already in $D, with $1 nodes"
}

bring_up() { # NUM_NODES
    local i nodes=()
    for ((i = 1; i <= $1; i++)); do nodes+=("n$i"); done
    for i in "${nodes[@]}"; do mkdir "$D/spool/$i"; done
    trap 'end head' EXIT # half a cluster is none
    start_head
    boot "${nodes[@]}"
    until_true 60 are_idle "$1" || fail "not all nodes came up: $("${ON_HEAD[@]}" sinfo -N -o '%N %T %E' 2>&1)"
    trap - EXIT
}

are_idle() { [ "$("${ON_HEAD[@]}" sinfo -h -N -p main -t idle -o %N 2>/dev/null | wc -l)" = "$1" ]; }

down() { # [DIR]
    set_folder "${1-}"
    end head # every node lives inside the head's namespaces
    clear_folder
    say "nothing is up in $D"
}

# ---- verbs

command_on() { # head|NODE [DIR] -- COMMAND...
    local where=${1-} dir=""
    shift
    [ "${1-}" = -- ] || { dir=${1-} && shift; }
    [ "${1-}" = -- ] && [ $# -ge 2 ] || fail "a command is missing: ... -- CMD"
    shift
    set_folder "$dir"
    need_head
    # exec: this process becomes the command, so that its end and its signals are the command's.
    # env -C: entering a mount namespace leaves the folder.
    [ "$where" != head ] || exec "${ON_HEAD[@]}" env -C "$PWD" "$@"
    need_power "$where"
    exec "${ON_NODE[@]}" "$@"
}

of_node() { # VERB NODE [DIR]
    local node=${2-}
    set_folder "${3-}"
    need_head
    need_node "$node"
    [ "$1" = boot ] || need_power "$node"
    case $1 in
        crash) crash "$node" ;;
        boot) boot "$node" ;;
        cut) "${ON_HEAD[@]}" ip link set "veth${node#n}" down ;;
        heal) "${ON_HEAD[@]}" ip link set "veth${node#n}" up ;;
        kill-slurmd) "${ON_NODE[@]}" bash -c "kill -9 $(cat "$D/slurmd.$node.pid")" ;;
        start-slurmd) "${ON_NODE[@]}" slurmd -f "$SLURM_CONF" -N "$node" </dev/null >>"$D/log/$node.log" 2>&1 ;;
    esac
}

main() {
    local verb=${1-} name=${*: -1}
    [ $# = 0 ] || shift
    case $verb in
        "" | -h | --help | help) usage ;;
        check) check && say "a cluster can run here" ;;
        up) up "$@" ;;
        down) down "$@" ;;
        run) command_on head "$@" ;;
        shell) command_on head "$@" -- bash ;;
        on) command_on "$@" ;;
        crash | boot | cut | heal | kill-slurmd | start-slurmd) of_node "$verb" "$@" ;;
        stop-controller | start-controller)
            set_folder "${1-}"
            need_head
            "${verb/-/_}"
            ;;
        head-init | node-init) # not for hands
            D=${SLURM_CONF%/slurm.conf}
            if [ "$verb" = head-init ]; then head_init; else node_init "${name##*:}" "${@:1:$#-1}"; fi
            ;;
        *) fail "no verb $verb (see --help)" ;;
    esac
}

main "$@"
