#!/usr/bin/env bash
# All three entries on the validation set of CLIC 2019, verified and listed beside Tucodec's results.
#
#   experiments/clic2019/all.sh OUT IMAGES...
#
# PSNR_CODECS, SSIM_MODELS, TRANSPARENT_MODELS, TRANSPARENT_CODECS: candidates of the entries, as CODECS and
# MODELS there; EFFORT for the learned ones. After a stop the same command resumes.
set -euo pipefail
here=$(dirname "$0")
out=$1
shift
tucodec=("${PYTHON:-python3}" -m lightning_tucodec.cli)
"${tucodec[@]}" clic check "$@" || [[ -n ${ANY_SET:-} ]] || {
    echo "set ANY_SET=1 to go on with other images" >&2
    exit 1
}
CODECS=${PSNR_CODECS:-} "$here/tucodecpsnr.sh" "$@" -o "$out/tucodecpsnr"
MODELS=${SSIM_MODELS:-} CODECS='' "$here/tucodecssim.sh" "$@" -o "$out/tucodecssim"
MODELS=${TRANSPARENT_MODELS:-} CODECS=${TRANSPARENT_CODECS:-} QPS='' LMBDAS='' \
    "$here/tucodecpsnr40db.sh" "$@" -o "$out/tucodecpsnr40db"
"${tucodec[@]}" clic compare "$out"/tucodec{ssim,psnr,psnr40db} --originals "$@"
