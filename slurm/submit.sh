#!/usr/bin/env bash
# Submit a launcher with the site's options and print the job's id; the other launchers call this.
#
#   slurm/submit.sh [--dry-run] [--cpu] [options of sbatch] -- SCRIPT [WORDS]
#
# --cpu: a job of one process without a GPU. --dry-run prints the command only.
# shellcheck source=slurm/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

dry=0
kind=train
options=()
while [[ $# -gt 0 && $1 != -- ]]; do
    case $1 in
    -h | --help) usage "$0" && exit 0 ;;
    --dry-run) dry=1 ;;
    --cpu) kind=cpu ;;
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
command=(sbatch --parsable --requeue --open-mode=append "${site[@]}" "${options[@]}" "$@")
if [[ $dry == 1 ]]; then
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi
if ! command -v sbatch >/dev/null; then
    say "sbatch is not there: this node may not submit"
    exit 1
fi
# A job that submits would hand its own shape on to the new job.
while read -r name; do
    [[ $name == SLURM_CONF ]] || unset "$name"
done < <(compgen -e SLURM_)
id=$("${command[@]}")
echo "${id%%;*}"
