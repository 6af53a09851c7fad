#!/usr/bin/env bash
# TucodecPSNR: the best pooled PSNR at 0.15 bpp from H.266 at several QPs, one for each image.
#
#   experiments/clic2019/tucodecpsnr.sh IMAGES... -o OUT [options of `tucodec allocate`, such as --slurm 50]
#
# QPS     quantisation parameters; the paper has "36 37 38"
# CODECS  codecs to run at each of them; "vvc" by default
# CANDIDATES  additional candidates, as full specifications
set -euo pipefail
# shellcheck source=/dev/null
. "$(dirname "$0")/candidates.sh"
add_swept "vvc" "36 37 38"
allocate --max-bpp 0.15 --maximise psnr
