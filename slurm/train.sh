#!/usr/bin/env bash
# One training on the nodes of a Slurm job. It saves checkpoints, is requeued and resumes without help.
#
#   slurm/train.sh [--dry-run] CONFIG.yaml [options of `tucodec fit`]
#   slurm/train.sh [--dry-run] --sweep DIR STAGE [NUMBER]     (what `tucodec sweep submit` submits)
#
# Run with bash, it submits itself with the site's options. In a job it trains, with one process per Slurm task.
# `tucodec fit` ends with status 75 after a signal to stop, when it has saved. Then, and when a process was killed,
# the job is requeued, at most SITE_MAX_RESTARTS times. After two starts in a row that were killed before training
# began it is not requeued. Where the node has no scontrol, a message says so and the job ends with status 75.
#SBATCH --job-name=tucodec
submitted=${SLURM_JOB_ID:+$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | sed -n 's/\.sh.*//;s|^ *Command=\(.*\)/.*|\1|p')}
for here in "$(dirname "${BASH_SOURCE[0]}")" "${TUCODEC_ROOT:-.}/slurm" "$submitted" "${SLURM_SUBMIT_DIR:-.}"{/slurm,}; do
    [[ ! -f $here/common.sh ]] || break
done
# shellcheck source=slurm/common.sh
source "$here/common.sh" || { echo "submit from the repository's folder, or set TUCODEC_ROOT" >&2 && exit 1; }

dry=()
if [[ ${1:-} == --dry-run ]]; then
    dry=(--dry-run)
    shift
fi
if [[ $# -lt 1 || $1 == -h || $1 == --help ]]; then
    usage "$TUCODEC_ROOT/slurm/train.sh"
    exit 2
fi

if ! in_slurm; then
    if [[ $1 == --sweep ]]; then
        echo "train.sh: submit a sweep with \`tucodec sweep submit\`" >&2
        exit 2
    fi
    name=$(basename "${1%.yaml}")
    [[ ${#dry[@]} -gt 0 ]] || mkdir -p slurm-logs
    exec "$TUCODEC_ROOT/slurm/submit.sh" "${dry[@]}" --job-name="$name" --output="slurm-logs/%x-%j.log" -- \
        "$TUCODEC_ROOT/slurm/train.sh" "$@"
fi

job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
restarts=${SLURM_RESTART_COUNT:-0}
site_setup
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

# --- One line an attempt begins and ends with: what `tucodec sweep status` reads, and the fence below. The program adds
# one when it has got as far as training ("begun").
attempts=""
note() { # note EVENT [STATUS [REASON]]
    [[ -n $attempts ]] || return 0
    local reason=${3:+", \"reason\": \"$3\""}
    printf '{"event": "%s", "job": "%s", "restart": %d, "time": %d, "status": %s%s}\n' \
        "$1" "$job" "$restarts" "$(date +%s)" "${2:-null}" "$reason" >>"$attempts"
}
last_note() { # The last line that a launcher wrote.
    sed '/"event": "begun"/d' "$attempts" | tail -n 1
}
killed_early() { # How many starts of this job, the latest in a row, were killed before training began, this one included.
    local line count=0 early=1
    [[ -n $attempts ]] || { echo 0 && return; }
    while read -r line; do
        case $line in
        *'"event": "begun"'*) early=0 ;;
        *'"event": "start", "job": "'"$job"'"'*) early=1 ;;
        *'"event": "end", "job": "'"$job"'"'*'"reason": "was killed'*) ((early)) && count=$((count + 1)) || count=0 ;;
        *'"event": "lost"'*) ;;
        *) count=0 ;;
        esac
    done <"$attempts"
    echo $((early ? count + 1 : 0))
}

if [[ $1 == --sweep ]]; then
    plan=$2
    number=${4:-$(own_share)}
    task=$3-$number
    config=$plan/configs/$task.yaml
    if [[ ${#dry[@]} == 0 ]]; then
        if [[ ! -f $config ]]; then
            status=0
            "${tucodec[@]}" sweep resolve "$plan" "$task" >/dev/null || status=$?
            if [[ $status != 0 ]]; then
                attempts=$plan/attempts/$task.jsonl
                note start
                note end "$status"
                exit "$status"
            fi
        fi
        attempts=$plan/attempts/$task.jsonl
    fi
    words=()
    if ((restarts == 0 && ${#dry[@]} == 0)); then
        sleep $((SITE_STAGGER_SECONDS * (number % 16)))
    fi
else
    config=$1
    words=("${@:2}")
    if [[ ${#dry[@]} == 0 ]] && mkdir -p slurm-logs; then
        attempts=slurm-logs/$job.jsonl
    fi
fi

shape=(--trainer.num_nodes "${SLURM_JOB_NUM_NODES:-1}" --trainer.devices "${SLURM_NTASKS_PER_NODE:-1}")
[[ -z $SITE_ACCELERATOR ]] || shape+=(--trainer.accelerator "$SITE_ACCELERATOR")
# Nothing stands between Slurm and the program: where cgroups tell what belongs to a job, signals reach only the
# processes that Slurm started itself.
command=(srun --kill-on-bad-exit=1 --export=ALL "--cpus-per-task=${SLURM_CPUS_PER_TASK:-1}"
    "${tucodec[@]}" fit --config "$config" "${shape[@]}" "${words[@]}")
if [[ ${#dry[@]} -gt 0 ]]; then
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi

# --- A fence. When Slurm loses a node, the processes there may live on while the job has started elsewhere. An
# attempt that is no longer the latest ends itself; one that finds a predecessor without an end waits for that, as long
# as another node may take to see the line (NFS: a minute). Besides, the program saves nothing once it was overtaken.
watch_seconds=3
mine=""
if [[ -n $attempts ]]; then
    mkdir -p "$(dirname "$attempts")"
    export TUCODEC_ATTEMPTS=$attempts
    if [[ -s $attempts && $(last_note) == *'"event": "start"'* ]]; then
        note lost
        sleep $((SITE_FENCE_SECONDS + 3 * watch_seconds))
    fi
    note start
    mine=$(last_note)
fi
superseded() { # Only another attempt writes after this one's start.
    [[ -n $mine && $(last_note) != "$mine" ]]
}

echo "train.sh: job $job, start $restarts, on ${SLURM_JOB_NODELIST:-this node}: $config"
# The signal before a time limit goes to srun's tasks; TERM at a requeue or preemption comes here too, and the tasks
# must have time to save themselves.
told=""
trap 'told=1' TERM USR1
"${command[@]}" &
step=$!
status=0
stopping=0
while :; do
    for ((i = 0; i < 2 * watch_seconds; i++)); do
        kill -0 "$step" 2>/dev/null || break 2
        sleep 0.5 || true
    done
    if ((stopping < 2)) && superseded; then
        # srun kills its processes at TERM: what they could save now is not wanted any more.
        ((stopping == 0)) && say "job $job goes on elsewhere; this attempt ends" && kill -TERM "$step"
        ((stopping == 1)) && kill -KILL "$step"
        stopping=$((stopping + 1))
    fi
done
wait "$step" || status=$?
if ((stopping > 0)) || superseded; then
    exit 75 # not 0, for which jobs that start from this one's weights may wait
fi
# srun ends with the highest status of all. A process of several that failed with n ends with 200 + n (see
# lightning_tucodec/training/runs/preemption.py); 128 + n means that signal n killed it.
if ((status > 200)); then
    status=$((status - 200))
fi
# The training is complete; only its mirror lacks the end. No reason to train it again, nor for others to wait.
if ((status == 3)); then
    say "job $job is complete, but its mirror lacks the end: start the same command again when the mirror works"
    status=0
fi
# Status 138 is USR1, the time limit. TERM comes here too when the job is told to stop, but not when srun ends the
# other processes after one was killed.
if ((status == 75 || status == 138)) || [[ $status -ge 128 && -n $told ]]; then
    reason="was told to stop"
elif ((status >= 128)); then
    reason="was killed"
else
    note end "$status"
    ((status == 0)) || say "job $job ended with status $status"
    exit "$status"
fi
seconds() { # seconds [DAYS-]HOURS:MINUTES:SECONDS
    [[ $1 =~ ^(([0-9]+)-)?([0-9]+):([0-9]+):([0-9]+)$ ]] || { echo 99999999 && return; } # UNLIMITED
    echo $((86400 * 10#${BASH_REMATCH[2]:-0} + 3600 * 10#${BASH_REMATCH[3]} + 60 * 10#${BASH_REMATCH[4]} + 10#${BASH_REMATCH[5]}))
}
cancelled() { # Whether scancel ends this job: Slurm does, neither at the time limit nor to start it again.
    local shown
    shown=$(scontrol show job "$job" 2>/dev/null) || return 1
    [[ $shown == *JobState=C[AO]* && $shown == *" Restarts=$restarts "* ]] || return 1 # CANCELLED, COMPLETING
    [[ $shown =~ RunTime=([^ ]+)\ TimeLimit=([^ ]+) ]] && (($(seconds "${BASH_REMATCH[1]}") < $(seconds "${BASH_REMATCH[2]}")))
}
stay_down() { # stay_down STATUS WHY
    note end "$status" "$2"
    say "job $job $2"
    exit "$1"
}
if cancelled; then
    stay_down 1 "was cancelled, and stays down; submitted again it goes on"
fi
if [[ $reason == "was killed" ]] && (($(killed_early) >= 2)); then
    stay_down 1 "was killed before training began, twice in a row: out of memory? see the log; when the cause is gone, submit it again"
fi
if ((restarts >= SITE_MAX_RESTARTS)); then
    stay_down 1 "$reason, and was started again $restarts times: it stays down (SITE_MAX_RESTARTS)"
fi
if ! command -v scontrol >/dev/null; then
    stay_down 75 "$reason; no scontrol here to requeue it: submit it again, it will go on"
fi
note end "$status" "$reason"
say "job $job $reason (status $status): requeue"
# It may fail because Slurm was first: then the job waits in the queue already.
scontrol requeue "$job" || true
exit 75
