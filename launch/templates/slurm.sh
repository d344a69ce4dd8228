# From here on, every job of farspan's has the same text.

say() { printf 'farspan: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

# Signals. bash hears none while a command runs in the foreground: what takes long runs in the background, and bash
# waits for it. TERM (from `scancel --batch --signal=TERM`) and USR1 (from Slurm, before the time limit) both reach this
# shell alone, and farspan as TERM, which means: save, and end.
child='' heard='' signals=0
hear() {
    heard=$1 signals=$((signals + 1))
    [[ -n $child ]] || early
    kill -TERM "$child" 2>/dev/null || true
}
early() { # ends a job that a signal reached before its run started
    [[ $heard != limit ]] || fail "the time limit came before the run started"
    say "stopped before the run started: nothing was written"
    exit 0
}
trap 'hear stop' TERM INT
trap 'hear limit' USR1
attend() { # runs a command, hands signals on to it, and returns its exit code
    local code before
    "$@" &
    child=$!
    while true; do
        before=$signals
        wait "$child" && code=0 || code=$?
        ((signals == before)) && break # else it was the signal that ended the wait
    done
    child=''
    return "$code"
}

# The end, whichever: Ray leaves the machines (`ray start --block` ends all that it has started), and the secret goes.
private='' head_step='' worker_step=''
leave() {
    local code=$? process
    trap - EXIT
    trap '' TERM INT USR1
    for process in $worker_step $head_step; do
        kill -TERM "$process" 2>/dev/null || true
    done
    [[ -z $private ]] || rm -rf "$private" # soon: a plain scancel leaves little time
    for _ in {1..30}; do # what then still runs ends with the job
        [[ -n $(jobs -rp) ]] || break
        sleep 1
    done
    if [[ -n $head_step && $code == 0 ]]; then # else Ray's own logs stay there, to be read
        timeout 30 "${step[@]}" --nodes="$nodes" --ntasks="$nodes" rm -rf "$scratch" || true
    fi
    if [[ -n ${requeue:-} ]]; then
        say "the time limit is near: the run is saved, and the job queues again"
        scontrol requeue "$SLURM_JOB_ID" || say "Slurm refused; submit this file again with resume=$run"
    fi
    exit "$code"
}
trap leave EXIT

for program in farspan ray; do
    command -v "$program" >/dev/null || fail "$program is not on the PATH; give cluster.template.setup=[…]"
done
cd "$SLURM_SUBMIT_DIR"
# Every machine must see the run's folder. A job that queues again keeps its number, and so finds its run.
run=${run/#\~\//$HOME/}
[[ $run == /* ]] || run=$PWD/$run
apostrophe="'"
quoted=$apostrophe${run//$apostrophe/\\$apostrophe}$apostrophe # as Hydra reads it
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
((${#hosts[@]} == nodes)) || fail "expected $nodes machines, Slurm gave ${#hosts[@]}: ${hosts[*]}"
head=${hosts[0]} # this one: the first machine runs this script

if [[ -n $interface ]]; then
    address=$(ip -o -4 addr show dev "$interface" | awk 'NR == 1 {split($4, part, "/"); print part[1]}') || address=
    export GLOO_SOCKET_IFNAME=$interface NCCL_SOCKET_IFNAME=$interface
else
    address=$(getent ahostsv4 "$head" | awk 'NR == 1 {print $1}') || address=
    # Some distributions give a machine's own name a loopback address, which no other machine reaches.
    if [[ -z $address || $address == 127.* && $nodes -gt 1 ]]; then
        address=$(hostname -I | awk '{print $1}') || address=
    fi
fi
[[ -n $address ]] || fail "$head has no IPv4 address; give cluster.template.interface=NAME"
offset=0
[[ -z $shared ]] || offset=$((SLURM_JOB_ID % 1000)) # another job's Ray may be on this machine
port=$((port + offset)) dashboard_port=$((dashboard_port + offset))
url=http://$address:$dashboard_port

# A Ray runs whatever it is sent, and listens on the network: without a secret, anyone there could act as this user.
# The secret is of this job alone, in a file that no one else may read; a variable could be seen in Slurm's records. It
# lies beside the runs because all machines see that place.
private=$(mktemp -d "$SLURM_SUBMIT_DIR/.farspan-$SLURM_JOB_ID-XXXXXX") # mode 700
(umask 077 && head -c 32 /dev/urandom | od -An -vtx1 | tr -d ' \n' >"$private/token")
unset RAY_ADDRESS RAY_API_SERVER_ADDRESS RAY_AUTH_TOKEN
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$private/token
export RAY_USAGE_STATS_ENABLED=0 RAY_worker_register_timeout_seconds=180

step=(srun --ntasks-per-node=1 --cpus-per-task="$cpus" --mem=0 --wait=0 --kill-on-bad-exit=0
    ${gres:+--gres="$gres"})
# The object store is near its least: nothing of farspan's goes through it. Ports that others need not know are taken
# as they are free: two jobs can share a machine. /tmp/ray may be another user's.
scratch=/tmp/farspan-$SLURM_JOB_ID
start=(ray start --num-cpus="$cpus" --num-gpus="$gpus" --object-store-memory=100000000
    --dashboard-agent-listen-port=0 --min-worker-port=0 --max-worker-port=0
    --temp-dir="$scratch" --block)
serve=(--head --node-ip-address="$address" --port="$port" --dashboard-host="$address" --dashboard-port="$dashboard_port"
    --ray-client-server-port="$((20001 + offset))")

say "Ray on ${hosts[*]}, at $url"
"${step[@]}" --nodes=1 --ntasks=1 --nodelist="$head" "${start[@]}" "${serve[@]}" >"$private/head.log" 2>&1 &
head_step=$!
answers() { (exec 3<>"/dev/tcp/$address/$port") 2>/dev/null; }
wait_for_head() {
    local deadline=$((SECONDS + join))
    until answers; do
        kill -0 "$head_step" 2>/dev/null || return 1
        ((SECONDS < deadline)) || return 1
        sleep 1
    done
}
tell() { sed 's/^/    /' "$1" | tail -n 20 >&2; }
attend wait_for_head || {
    [[ -z $heard ]] || early
    tell "$private/head.log"
    fail "Ray did not start on $head"
}

if ((nodes > 1)); then
    others=$(IFS=,; printf '%s' "${hosts[*]:1}")
    "${step[@]}" --nodes=$((nodes - 1)) --ntasks=$((nodes - 1)) --nodelist="$others" \
        "${start[@]}" --address="$address:$port" >"$private/workers.log" 2>&1 &
    worker_step=$!
fi
count_machines='
import logging, sys, time
import ray
address, wanted, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
deadline = time.monotonic() + seconds
ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
while (here := sum(node["Alive"] for node in ray.nodes())) < wanted:
    if time.monotonic() > deadline:
        sys.exit(f"farspan: {here} of {wanted} machines have joined Ray after {seconds:.0f} s")
    time.sleep(1)
'
python=$(command -v python || command -v python3)
attend "$python" -c "$count_machines" "$address:$port" "$nodes" "$join" || {
    [[ -z $heard ]] || early
    [[ ! -e $private/workers.log ]] || tell "$private/workers.log"
    fail "the machines did not form a cluster"
}
[[ -z $heard ]] || early

# A job that queued again, after a time limit or with other machines after one was lost, goes on where its run was.
code=0
if ((${SLURM_RESTART_COUNT:-0} > 0)) && [[ -e $run/config.yaml ]]; then
    attend again || code=$?
else
    attend begin || code=$?
fi
requeue=
if [[ $heard == limit ]] && ((code == 0)) && ((${SLURM_RESTART_COUNT:-0} < requeues)); then
    # Saved with steps left to take; a run that was complete just then needs no other turn.
    if [[ ! -e $run/summary.json ]] || grep -q '"stopped": *true' "$run/summary.json"; then
        requeue=yes
    fi
fi
exit "$code"
