# shellcheck shell=bash
# Sourced by the launchers: where the repository is, the site file, and how `tucodec` is called.
#
# A script that sbatch runs is a copy in Slurm's spool, so the launchers look for this file beside
# themselves, in $TUCODEC_ROOT/slurm, beside the script that Slurm says was submitted, and where that was done.
set -euo pipefail

TUCODEC_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export TUCODEC_ROOT

# Submitted from inside slurm/: work where the repository's relative paths are right.
if [[ $PWD == "$TUCODEC_ROOT/slurm" ]]; then
    cd "$TUCODEC_ROOT"
fi

say() { echo "${0##*/}: $*" >&2; }

usage() { # The comment at the head of the script, from its second line to the first that is not a comment.
    sed -n '2,/^[^#]/{/^#SBATCH/d;/^# shellcheck/d;s/^# \{0,1\}//p}' "$1"
}

# What a site file may set; slurm/site.sh explains each.
SITE_SBATCH=""
SITE_SBATCH_CPU=""
SITE_NODES=1
SITE_TASKS_PER_NODE=1
SITE_CPUS_PER_TASK=4
SITE_TIME=1-00:00:00
SITE_SIGNAL_SECONDS=300
SITE_MAX_RESTARTS=100
SITE_FENCE_SECONDS=66
SITE_ACCELERATOR=""
SITE_CONTAINER=""
SITE_TUCODEC=""
SITE_STAGGER_SECONDS=0
# shellcheck disable=SC2317,SC2329 # a site file puts its own in the place of this one
site_setup() { :; }
TUCODEC_SITE=${TUCODEC_SITE:-$TUCODEC_ROOT/slurm/site.sh}
if [[ ! -f $TUCODEC_SITE ]]; then
    say "no site file $TUCODEC_SITE"
    exit 1
fi
TUCODEC_SITE=$(cd "$(dirname "$TUCODEC_SITE")" && pwd)/${TUCODEC_SITE##*/}
export TUCODEC_SITE
# shellcheck source=slurm/site.sh
source "$TUCODEC_SITE"

# Words before every command: a container, the program. A path to a program may hold spaces.
program=tucodec
if [[ -x $TUCODEC_ROOT/.venv/bin/tucodec ]]; then
    program=$TUCODEC_ROOT/.venv/bin/tucodec
fi
program=${SITE_TUCODEC:-$program}
# shellcheck disable=SC2206,SC2034 # the site file gives words; the launchers use them
tucodec=($SITE_CONTAINER)
if [[ -x $program ]]; then
    tucodec+=("$program")
else
    # shellcheck disable=SC2206
    tucodec+=($program)
fi

in_slurm() { [[ -n ${SLURM_JOB_ID:-} ]]; }

# In an element of the arrays that `submit.sh --shares N` or `--before N` makes: which share is its own.
own_share() { echo $((${TUCODEC_SHARES_BEFORE:-0} + ${SLURM_ARRAY_TASK_ID:-0})); }
