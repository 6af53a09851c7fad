#!/usr/bin/env bash
# Submit a launcher with the site's options and print the job's id; the other launchers call this.
#
#   slurm/submit.sh [--dry-run] [--cpu] [--shares N | --before N] [options of sbatch] -- SCRIPT [WORDS]
#
# --cpu: a job of one process without a GPU. --dry-run prints the command only. --shares: an array of N jobs, or several
# arrays where the cluster's MaxArraySize is smaller; their ids are joined by `:`, as --dependency takes them. --before:
# element i of the array that the options ask for is number N + i.
# shellcheck source=slurm/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

dry=0
kind=train
shares=0
first=0
options=()
while [[ $# -gt 0 && $1 != -- ]]; do
    case $1 in
    -h | --help) usage "$0" && exit 0 ;;
    --dry-run) dry=1 ;;
    --cpu) kind=cpu ;;
    --shares) shares=$2 && shift ;;
    --before) first=$2 && shift ;;
    *) options+=("$1") ;;
    esac
    shift
done
if [[ $# -lt 2 ]]; then
    usage "$0" >&2
    exit 2
fi
shift
# shellcheck disable=SC2206 # the site file gives options as words
if [[ $kind == train ]]; then
    site=($SITE_SBATCH "--nodes=$SITE_NODES" "--ntasks-per-node=$SITE_TASKS_PER_NODE"
        "--cpus-per-task=$SITE_CPUS_PER_TASK" "--time=$SITE_TIME" "--signal=USR1@$SITE_SIGNAL_SECONDS")
else
    site=($SITE_SBATCH_CPU)
fi
if [[ $dry == 0 ]] && ! command -v sbatch >/dev/null; then
    say "sbatch is not there: this node may not submit"
    exit 1
fi
size=$shares
if ((shares > 0)) && command -v scontrol >/dev/null; then
    limit=$({ scontrol show config 2>/dev/null || true; } | sed -n 's/^MaxArraySize *= *\([0-9]*\)$/\1/p') # indices from 0
    ((${limit:-0} < 2 || limit > shares)) || size=$((limit - 1))
fi
# A job that submits would hand its own shape on to the new job.
while read -r name; do
    [[ $name == SLURM_CONF ]] || unset "$name"
done < <(compgen -e SLURM_)

ids=()
submit() { # submit BEFORE OPTION...
    local command=(sbatch --parsable --requeue --open-mode=append "${site[@]}" "${options[@]}" "${@:2}")
    local id
    if [[ $dry == 1 ]]; then
        printf '%q ' "${command[@]}" "${script[@]}"
        echo
        return
    fi
    # A cluster may hand nothing of this environment on to jobs (SBATCH_EXPORT=NONE): what a job must know stands at
    # the head of its script.
    id=$({
        echo '#!/usr/bin/env bash'
        printf 'export %s=%q\n' TUCODEC_ROOT "$TUCODEC_ROOT" TUCODEC_SITE "$TUCODEC_SITE" TUCODEC_SHARES_BEFORE "$1"
        printf 'set --'
        printf ' %q' "${script[@]:1}"
        echo
        cat "${script[0]}"
    } | "${command[@]}")
    ids+=("${id%%;*}")
}

script=("$@")
if ((shares == 0)); then
    submit "$first"
fi
for ((before = 0; before < shares; before += size)); do
    submit "$before" "--array=1-$((shares - before < size ? shares - before : size))"
done
if [[ $dry == 0 ]]; then
    (IFS=: && echo "${ids[*]}")
fi
