#!/usr/bin/env bash
# Build shards on many nodes: two arrays, one after the other, and a job that writes the index.
#
#   PARTS=16 slurm/build_shards.sh [--dry-run] SRC... --out DIR [options of `tucodec shards build`]
#
# Each element of the first array inspects its share of the photographs. The second array makes the same call
# and, since all notes exist, writes its share of the shards. The last job does the work of lost elements and
# writes the index. Submitting again after a failure resumes the build. CPUS=8: processors per job. Other
# options of the cluster are in slurm/site.sh (SITE_SBATCH_CPU).
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
    usage "$TUCODEC_ROOT/slurm/build_shards.sh"
    exit 2
fi

if in_slurm; then # --share PARTS or nothing, then the words
    part=()
    if [[ $1 == --share ]]; then
        part=(--part "$(own_share)/$2")
        shift 2
    fi
    site_setup
    exec "${tucodec[@]}" shards build "$@" --workers "${SLURM_CPUS_PER_TASK:-1}" "${part[@]}"
fi

parts=${PARTS:-8}
logs=${LOGS:-slurm-logs}
[[ ${#dry[@]} -gt 0 ]] || mkdir -p "$logs"

submit() { # submit NAME OPTION... -- WORDS: sets `job`
    local name=$1
    shift
    job=$("$TUCODEC_ROOT/slurm/submit.sh" "${dry[@]}" --cpu --job-name="$name" --cpus-per-task="${CPUS:-8}" \
        --output="$logs/%x-%A-%a.log" "$@")
    if [[ ${#dry[@]} -gt 0 ]]; then
        echo "$job"
        job="<$name>"
    fi
}

self=$TUCODEC_ROOT/slurm/build_shards.sh
submit shards-inspect --shares "$parts" -- "$self" --share "$parts" "$@"
inspect=$job
submit shards-write --shares "$parts" --dependency="afterany:$inspect" -- "$self" --share "$parts" "$@"
write=$job
submit shards-merge --dependency="afterany:$write" -- "$self" "$@"
echo "inspect $inspect, write $write, merge $job; logs in $logs"
