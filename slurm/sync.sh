#!/usr/bin/env bash
# Upload to W&B the logs of runs on nodes without internet access. Call it where there is internet access.
#
#   slurm/sync.sh [--dry-run] [--every MINUTES] RUN...
#
# RUN is a run folder, or all runs of a sweep (sweeps/NAME-ID/runs/*). Calls `tucodec wandb-sync`, which continues where
# it stopped. With --every it repeats until it is stopped. It needs no Slurm, but may be submitted with sbatch as well.
#SBATCH --job-name=tucodec-sync
submitted=${SLURM_JOB_ID:+$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | sed -n 's/\.sh.*//;s|^ *Command=\(.*\)/.*|\1|p')}
for here in "$(dirname "${BASH_SOURCE[0]}")" "${TUCODEC_ROOT:-.}/slurm" "$submitted" "${SLURM_SUBMIT_DIR:-.}"{/slurm,}; do
    [[ ! -f $here/common.sh ]] || break
done
# shellcheck source=slurm/common.sh
source "$here/common.sh" || { echo "submit from the repository's folder, or set TUCODEC_ROOT" >&2 && exit 1; }

dry=0
every=0
while [[ $# -gt 0 && $1 == --* ]]; do
    case $1 in
    --dry-run) dry=1 ;;
    --every)
        every=${2:-}
        [[ $every =~ ^[1-9][0-9]*$ ]] || { say "--every: a number of minutes" && exit 2; }
        shift
        ;;
    *) set -- ;;
    esac
    shift || true
done
if [[ $# -lt 1 ]]; then
    usage "$TUCODEC_ROOT/slurm/sync.sh"
    exit 2
fi
command=("${tucodec[@]}" wandb-sync "$@")
if [[ $dry == 1 ]]; then
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi
site_setup
if [[ $every == 0 ]]; then
    exec "${command[@]}"
fi
while :; do
    "${command[@]}" || say "status $?; once more in $every minutes"
    sleep $((60 * every))
done
