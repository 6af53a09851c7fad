#!/usr/bin/env bash
# TucodecSSIM: the best MS-SSIM at 0.15 bpp from learned models, one for each image.
#
#   experiments/clic2019/tucodecssim.sh IMAGES... -o OUT [options of `tucodec allocate`, such as --slurm 50]
#
# MODELS  names or files; the paper has five, lambda 0.2 ... 0.6 of experiments/tucodecssim.yaml. Shipped is one network
#         for all rates, used at ten qualities
# EFFORT  of the encoder, 0 ... 9
# LMBDAS  further values of lambda for each model's encoder (docs/allocation.md)
# CANDIDATES  additional candidates, as full specifications
set -euo pipefail
# shellcheck source=/dev/null
. "$(dirname "$0")/candidates.sh"
add_shipped_ssim
allocate --max-bpp 0.15 --maximise ms-ssim
