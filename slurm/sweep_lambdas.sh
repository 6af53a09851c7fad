#!/usr/bin/env bash
# Train a whole sweep: the five models of TucodecSSIM, or the sweep in SWEEP.yaml.
#
#   sbatch slurm/sweep_lambdas.sh [SWEEP.yaml] [options of `tucodec sweep submit`]
#   bash slurm/sweep_lambdas.sh --dry-run         prints the sbatch commands
#
# A small planning job: it resolves the sweep into one configuration for each task (folder sweeps/NAME-ID) and submits
# the tasks with the options of slurm/site.sh. It may also run on the login node, with bash. Where nodes may not submit
# jobs, it prints the command to run elsewhere. A second run submits only the tasks that are neither complete nor queued.
#SBATCH --job-name=tucodec-sweep --ntasks=1 --cpus-per-task=1 --time=30
submitted=${SLURM_JOB_ID:+$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | sed -n 's/\.sh.*//;s|^ *Command=\(.*\)/.*|\1|p')}
for here in "$(dirname "${BASH_SOURCE[0]}")" "${TUCODEC_ROOT:-.}/slurm" "$submitted" "${SLURM_SUBMIT_DIR:-.}"{/slurm,}; do
    [[ ! -f $here/common.sh ]] || break
done
# shellcheck source=slurm/common.sh
source "$here/common.sh" || { echo "submit from the repository's folder, or set TUCODEC_ROOT" >&2 && exit 1; }

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    usage "$TUCODEC_ROOT/slurm/sweep_lambdas.sh"
    exit 2
fi
sweep=$TUCODEC_ROOT/experiments/sweeps/tucodecssim.yaml
if [[ $# -gt 0 && $1 != -* ]]; then
    sweep=$1
    shift
fi
site_setup
exec "${tucodec[@]}" sweep submit "$sweep" "$@"
