#!/usr/bin/env bash
# Export runs and measure them with real files on a folder of images, in one job.
#
#   slurm/evaluate.sh [--dry-run] IMAGES OUT.json RUN... [-- options of `tucodec evaluate`]
#
# RUN is a run folder, or all runs of a sweep (sweeps/NAME-ID/runs/*). Models are written beside OUT.json, in
# OUT-models/, under the run's name, or under its whole path where two runs have the same name. Add classical
# codecs with: -- --codec jpeg:q={10,30,50}
#SBATCH --job-name=tucodec-evaluate
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
if [[ $# -lt 3 ]]; then
    usage "$TUCODEC_ROOT/slurm/evaluate.sh"
    exit 2
fi
if ! in_slurm; then
    [[ ${#dry[@]} -gt 0 ]] || mkdir -p slurm-logs
    exec "$TUCODEC_ROOT/slurm/submit.sh" --cpu "${dry[@]}" --job-name=tucodec-evaluate --cpus-per-task="$SITE_CPUS_PER_TASK" \
        --output="slurm-logs/%x-%j.log" -- "$TUCODEC_ROOT/slurm/evaluate.sh" "$@"
fi

do_or_show() {
    if [[ ${#dry[@]} -gt 0 ]]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

site_setup
images=$1
out=$2
shift 2
models=${out%.json}-models
specs=()
extra=()
runs=()
for word in "$@"; do
    [[ $word != -- ]] || break
    runs+=("$(realpath -s -m "$word")")
done
twice=$(for run in "${runs[@]}"; do basename "$run"; done | sort | uniq -d)
while [[ $# -gt 0 && $1 != -- ]]; do
    run=$(realpath -s -m "$1")
    [[ -n $twice ]] || run=$(basename "$run")
    model=$models/${run#/}.safetensors
    do_or_show "${tucodec[@]}" export "$1" -o "$model" --force
    specs+=("$model")
    shift
done
if [[ $# -gt 0 ]]; then
    shift
    while [[ $# -gt 0 ]]; do
        if [[ $1 == --codec ]]; then
            shift
            while [[ $# -gt 0 && $1 != -* ]]; do
                specs+=("$1")
                shift
            done
        else
            extra+=("$1")
            shift
        fi
    done
fi
do_or_show "${tucodec[@]}" evaluate "$images" --codec "${specs[@]}" -o "$out" --workers "${SLURM_CPUS_PER_TASK:-1}" "${extra[@]}"
