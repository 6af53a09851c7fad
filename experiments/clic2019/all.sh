#!/usr/bin/env bash
# All three entries on the validation set of CLIC 2019, verified and listed beside Tucodec's results.
#
#   experiments/clic2019/all.sh OUT IMAGES...
#
# PSNR_CODECS, SSIM_MODELS, TRANSPARENT_MODELS, TRANSPARENT_CODECS: candidates of the entries, as CODECS and
# MODELS there; EFFORT for the learned ones. After a stop the same command resumes.
set -euo pipefail
[[ $# -ge 2 ]] || {
    echo "usage: experiments/clic2019/all.sh OUT IMAGES..." >&2
    exit 2
}
here=$(dirname "$0")
out=$1
shift
tucodec=("${PYTHON:-python3}" -m lightning_tucodec.cli)
"${tucodec[@]}" clic check "$@" || [[ -n ${ANY_SET:-} ]] || {
    echo "set ANY_SET=1 to go on with other images" >&2
    exit 1
}
entries=()
failed=0

# Makes one entry; one whose limits cannot be met does not stop the others.
entry() {
    local status=0
    "$here/$1.sh" "${@:2}" -o "$out/$1" || status=$?
    case $status in
    0) entries+=("$out/$1") ;;
    1) failed=1 ;;
    *) exit "$status" ;;
    esac
}

CODECS=${PSNR_CODECS:-} entry tucodecpsnr "$@"
MODELS=${SSIM_MODELS:-} CODECS='' entry tucodecssim "$@"
MODELS=${TRANSPARENT_MODELS:-} CODECS=${TRANSPARENT_CODECS:-} QPS='' LMBDAS='' entry tucodecpsnr40db "$@"
if [[ ${#entries[@]} -gt 0 ]]; then
    "${tucodec[@]}" clic compare "${entries[@]}" --originals "$@"
fi
exit "$failed"
