#!/usr/bin/env bash
# Build shards on many nodes: two arrays, one after the other, and a step that writes the index.
#
#   PARTS=16 slurm/build_shards.sh SRC... --out DIR [options of `tucodec shards build`]
#
# Every element of the first array inspects its share of the photographs; the second array does the
# same call again and, all notes being there, writes its share of the shards. The last job does what a
# lost element has left and writes the index. Submitting anew after a failure goes on where it
# stopped. Options for sbatch itself (partition, account, time) come from SBATCH_* variables.
set -euo pipefail

if [[ $# -lt 1 || $1 == -h || $1 == --help ]]; then
    sed -n '2,10s/^# \{0,1\}//p' "$0"
    exit 2
fi

parts=${PARTS:-8}
cpus=${CPUS:-8}
command=$(printf '%q ' tucodec shards build "$@" --workers "$cpus")
logs=${LOGS:-slurm-logs}
mkdir -p "$logs"

submit() { # submit NAME DEPENDENCY-OPTION... -- SHELL-COMMAND
    local name=$1
    shift
    local options=()
    while [[ $1 != -- ]]; do
        options+=("$1")
        shift
    done
    sbatch --parsable --job-name="$name" --cpus-per-task="$cpus" --requeue \
        --output="$logs/%x-%A-%a.log" "${options[@]}" --wrap "$2"
}

share="$command --part \$SLURM_ARRAY_TASK_ID/$parts"
inspect=$(submit shards-inspect --array="1-$parts" -- "$share")
write=$(submit shards-write --array="1-$parts" --dependency="afterok:${inspect%%;*}" -- "$share")
merge=$(submit shards-merge --dependency="afterany:${write%%;*}" -- "$command")
echo "inspect ${inspect%%;*}, write ${write%%;*}, merge ${merge%%;*}; logs in $logs"
