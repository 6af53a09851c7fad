#!/usr/bin/env bash
# The budgets of CLIC's later years, 0.075, 0.15 and 0.3 bpp over the set, in one submission with one decoder.
#
#   experiments/clic2019/budgets.sh IMAGES... -o OUT [options of `tucodec allocate`]
#
# BUDGETS  bits a pixel, with commas; MAXIMISE  psnr or ms-ssim ("ms-ssim")
# MODELS, EFFORT, LMBDAS, CANDIDATES  as in tucodecssim.sh
# CODECS, QPS  additional codecs, such as "vvc" at each of "37 40"
set -euo pipefail
# shellcheck source=/dev/null
. "$(dirname "$0")/candidates.sh"
add_shipped_ssim
if [[ -n ${CODECS:-} ]]; then
    add_swept "" "30 34 37 40 44"
fi
allocate --max-bpp "${BUDGETS:-0.075,0.15,0.3}" --maximise "${MAXIMISE:-ms-ssim}"
