#!/usr/bin/env bash
# Stop a cluster that start.sh made, with everything that runs in it, and remove its folder.
#
#   slurm/localcluster/stop.sh DIR
set -euo pipefail

if [[ $# != 1 || $1 == -h || $1 == --help ]]; then
    sed -n '2,4s/^# \{0,1\}//p' "$0"
    exit 2
fi
dir=$(cd "$1" && pwd)
if [[ ! -f $dir/port ]]; then
    echo "localcluster: $dir holds no cluster" >&2
    exit 1
fi

# A process belongs to the cluster when its environment names the cluster's configuration.
members() {
    local file
    for file in /proc/[0-9]*/environ; do
        if tr '\0' '\n' <"$file" 2>/dev/null | grep -qxF "SLURM_CONF=$dir/slurm.conf"; then
            file=${file%/environ}
            # The caller's own shell may have sourced the cluster's env file.
            [[ $(<"$file/comm") == @(slurmctld|slurmd|slurmstepd) ]] && echo "${file#/proc/}"
        fi
    done 2>/dev/null
    return 0
}

signal() { # signal NAME PID...
    local name=$1
    shift
    [[ $# == 0 ]] || kill "-$name" "$@" 2>/dev/null || true
}

# Jobs first: their step daemons take the processes of the jobs along.
if [[ -f $dir/slurm.conf ]] && SLURM_CONF=$dir/slurm.conf timeout 10 scancel --full --signal=KILL --state=RUNNING \
    --user="$(id -un)" 2>/dev/null; then
    SLURM_CONF=$dir/slurm.conf timeout 10 scancel --user="$(id -un)" 2>/dev/null || true
fi
for _ in $(seq 50); do
    mapfile -t found < <(members)
    steps=0
    for process in "${found[@]}"; do
        [[ $(cat "/proc/$process/comm" 2>/dev/null) == slurmstepd ]] && steps=1
    done
    [[ $steps == 1 ]] || break
    sleep 0.2
done
mapfile -t found < <(members)
signal TERM "${found[@]}"
[[ -f $dir/munge/pid ]] && signal TERM "$(<"$dir/munge/pid")"
for _ in $(seq 50); do
    mapfile -t found < <(members)
    [[ ${#found[@]} -gt 0 ]] || break
    sleep 0.1
done
signal KILL "${found[@]}"
rmdir "/tmp/.tucodec-localcluster-$(<"$dir/port")" 2>/dev/null || true
rm -rf "$dir"
