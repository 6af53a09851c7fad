#!/usr/bin/env bash
# Run by the jobs of `tucodec allocate --slurm N`, which submits them.
#
#   slurm/allocate.sh [--share N] IMAGES... [options of `tucodec allocate`]
#
# --share: as an array element, code one of N shares of the candidates, without choosing.
submitted=${SLURM_JOB_ID:+$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | sed -n 's/\.sh.*//;s|^ *Command=\(.*\)/.*|\1|p')}
for here in "$(dirname "${BASH_SOURCE[0]}")" "${TUCODEC_ROOT:-.}/slurm" "$submitted" "${SLURM_SUBMIT_DIR:-.}"{/slurm,}; do
    [[ ! -f $here/common.sh ]] || break
done
# shellcheck source=slurm/common.sh
source "$here/common.sh" || { echo "submit from the repository's folder, or set TUCODEC_ROOT" >&2 && exit 1; }

if [[ $# -lt 1 ]] || ! in_slurm; then
    usage "$TUCODEC_ROOT/slurm/allocate.sh"
    exit 2
fi
part=()
if [[ $1 == --share ]]; then
    part=(--part "$(own_share)/$2")
    shift 2
fi
site_setup
exec "${tucodec[@]}" allocate --workers "${SLURM_CPUS_PER_TASK:-1}" "$@" "${part[@]}"
