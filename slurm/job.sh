# shellcheck shell=bash
# What the batch scripts share: site settings, the run's folder, and a job's end. They source this file, and have set
# `files` to its folder.
set -u

say() { echo "slurm: $*"; }
refuse() {
    echo "slurm: $*" >&2
    exit 2
}

[ -n "${SLURM_JOB_ID:-}" ] || refuse "got no SLURM job, expected one; submit this script with sbatch"

# Settings of the site; each may also come from the environment of sbatch.
CONTAINER=() SRUN_ARGS=()
site=${files:?}/site.env
# shellcheck source=site.env.example
if [ -f "$site" ]; then . "$site" || refuse "got an error from $site"; fi
PYTHON=${PYTHON:-python}
RETRIES=${RETRIES:-0}
[[ $RETRIES =~ ^[0-9]+$ ]] || refuse "RETRIES: got '$RETRIES', expected a number, such as 2"
if [ -n "${INTERFACE:-}" ]; then export NCCL_SOCKET_IFNAME=$INTERFACE GLOO_SOCKET_IFNAME=$INTERFACE; fi
# srun reads sbatch's --cpus-per-task from here alone.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi

# An array's first job bears the id of the whole array, which scontrol would requeue.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

# run_folder [ARGUMENTS]: sets `folder` from --run.dir and --run.name, else the same name at every start of this job.
run_folder() {
    local dir='' name='' key value
    while (($#)); do
        key=${1%%=*} value=${2-}
        if [ "$key" != "$1" ]; then value=${1#*=}; fi
        if [ "$value" = null ]; then value=''; fi
        case $key in
            --run.dir) dir=$value ;;
            --run.name) name=$value ;;
            *) ;;
        esac
        shift
    done
    if [ -n "$name" ]; then
        folder=${dir:-runs}/$name
    else
        folder=${dir:-runs/${SLURM_JOB_NAME//\//_}-$job}
    fi
}

# processes: how many to start on a node.
processes() {
    local count=${NPROC:-${SLURM_GPUS_ON_NODE:-}}
    if [ -z "$count" ]; then
        echo "slurm: no GPUs on the node, so 1 process; NPROC=4 sbatch ... starts 4" >&2
        count=1
    fi
    [[ $count =~ ^[1-9][0-9]*$ ]] || refuse "NPROC: got '$count', expected the processes of a node, such as 4"
    echo "$count"
}

# threads RANKS: the CPU threads of each of a node's ranks.
threads() {
    local share=$((${SLURM_CPUS_ON_NODE:-1} / $1))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((share > 0 ? share : 1))}
}

# port: one that is free here on the job's first node, where rank 0 or torchrun's rendezvous listens.
port() {
    local candidate=$((20000 + SLURM_JOB_ID * 31 % 12000))
    while (exec 3<>"/dev/tcp/127.0.0.1/$candidate") 2>/dev/null; do candidate=$((candidate + 1)); done
    echo "$candidate"
}

first_node() { scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1; }

# train_with_torchrun [ARGUMENTS]: an agent a node, which starts the ranks. Exits as the job should.
train_with_torchrun() {
    local ranks endpoint
    ranks=$(processes) || exit
    endpoint=$(first_node):$(port)
    threads "$ranks"
    arguments=("$@")
    # srun gives a signal to all processes of a step: USR1 is for the ranks, and the agent must outlive it.
    # shellcheck disable=SC2016  # for the shell on each node
    supervise --ntasks-per-node=1 --ntasks="$SLURM_JOB_NUM_NODES" -- \
        'trap "" USR1; exec "$0" -m torch.distributed.run --rdzv-conf=is_host=$((SLURM_NODEID == 0)) "$@"' "$PYTHON" \
        --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$ranks" --max-restarts=0 \
        --rdzv-backend=c10d --rdzv-endpoint="$endpoint" --rdzv-id="$job-${SLURM_RESTART_COUNT:-0}"
}

# train_with_srun [ARGUMENTS]: each task is a rank. Exits as the job should.
train_with_srun() {
    MASTER_ADDR=$(first_node) MASTER_PORT=$(port)
    export MASTER_ADDR MASTER_PORT
    local tasks=${SLURM_NTASKS:-$SLURM_JOB_NUM_NODES}
    threads $(((tasks + SLURM_JOB_NUM_NODES - 1) / SLURM_JOB_NUM_NODES))
    arguments=("$@")
    # A rank must outlive a USR1 until dist_train listens to it.
    # shellcheck disable=SC2016
    supervise --ntasks="$tasks" -- 'trap "" USR1; exec "$0" -u "$@"' "$PYTHON"
}

# supervise SRUN_OPTIONS -- SCRIPT WORD...: trains with `arguments`, by a bash script on each node that gets the words
# and then the module with its arguments. Passes a stop on to the ranks. Exits as the job should.
supervise() {
    local options=() before code interrupted asking=''
    while [ "$1" != -- ]; do options+=("$1") && shift; done
    shift
    run_folder "${arguments[@]}"
    if [ "$(status)" = finished ] && [ -n "${SLURM_RESTART_COUNT:-}" ]; then
        say "the run in $folder has finished before"
        exit 0
    fi
    before=$(stamp)
    set -- srun --kill-on-bad-exit=1 "${options[@]}" "${SRUN_ARGS[@]}" "${CONTAINER[@]}" bash -c "$@" \
        -m dist_train "${arguments[@]}" --run.dir "$folder" --run.name null
    say "job $job, start ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST, OMP_NUM_THREADS=$OMP_NUM_THREADS"
    say "${*@Q}"

    # In the background, as bash runs a trap only between commands. `wait` ends early with each signal.
    trap 'interrupted=USR1' USR1
    trap 'interrupted=TERM' TERM
    "$@" &
    local child=$!
    while :; do
        interrupted=
        wait "$child"
        code=$?
        [ -n "$interrupted" ] || break
        say "got $interrupted, asking the ranks to save and stop"
        if [ -z "$asking" ]; then
            ask "$child" &
            asking=$!
        fi
    done
    trap '' USR1 TERM
    if [ -n "$asking" ]; then
        kill "$asking" 2>/dev/null
        wait "$asking"
    fi

    if [ "$code" -eq 0 ]; then exit 0; fi
    # A status that stood there before is that of an earlier start.
    if [ "$code" -eq 75 ] || { [ "$(status)" = preempted ] && [ "$(stamp)" != "$before" ]; }; then
        say "the run is saved in $folder"
        requeue
        exit 75
    fi
    if [ -n "$asking" ] && { [ "$code" -eq 138 ] || [ "$code" -eq 143 ]; }; then
        # Of USR1 or srun's TERM after it. A failure of its own comes again at the next start, where nobody asks.
        say "the ranks ended of the signal before they could save"
        requeue
        exit 75
    fi
    if [ "$code" -ne 2 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "$RETRIES" ]; then
        say "the run failed with code $code; start $((${SLURM_RESTART_COUNT:-0} + 1)) of at most $RETRIES more"
        requeue
    fi
    exit "$code"
}

# ask SRUN: passes a stop on, more than once, as a rank that is still starting does not listen yet.
ask() {
    local nap=''
    trap 'kill $nap 2>/dev/null; exit' TERM
    while kill -USR1 "$1" 2>/dev/null; do
        sleep "${ASK_EVERY_S:-10}" &
        nap=$!
        wait "$nap"
    done
}

status() { sed -n 's/^ *"status": "\([a-z]*\)".*/\1/p' "$folder/summary.json" 2>/dev/null | head -n 1; }
stamp() { stat -c '%i %y' "$folder/summary.json" 2>/dev/null; }

# requeue: puts the job back in the queue, unless it was cancelled or SLURM ends it itself. SLURM kills this shell.
requeue() {
    local state
    state=$(scontrol -o show job "$job" | sed -n 's/.* JobState=\([A-Z_]*\) .*/\1/p')
    if [ "$state" != RUNNING ]; then
        say "the job is $state, so it does not go back in the queue"
    elif scontrol requeue "$job"; then
        say "back in the queue"
    else
        say "not taken back in the queue; the same command with --run.dir ${folder@Q} goes on"
    fi
}
