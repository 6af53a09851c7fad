#!/usr/bin/env bash
# TucodecPSNR40dB: the fewest bytes at a pooled PSNR of 40 dB and an MS-SSIM of 0.993.
#
#   experiments/clic2019/tucodecpsnr40db.sh IMAGES... -o OUT [options of `tucodec allocate`]
#
# MODELS  names or files; the paper has five, lambda 4096 ... 8000 of experiments/tucodecpsnr40db.yaml
# EFFORT, LMBDAS  as in tucodecssim.sh
# CODECS, QPS     additional codecs; "hevc" (4:4:4) if no other candidate is given
# CANDIDATES  additional candidates, as full specifications
set -euo pipefail
# shellcheck source=/dev/null
. "$(dirname "$0")/candidates.sh"
if [[ -n ${MODELS:-} ]]; then
    add_learned ""
fi
if [[ -n ${CODECS:-} || -z ${MODELS:-}${CANDIDATES:-} ]]; then
    add_swept "hevc" "14 16 18 20 22 24"
fi
allocate --min-psnr 40 --min-ms-ssim 0.993
