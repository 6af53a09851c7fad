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

# A process belongs to the cluster when its environment names the cluster's configuration. The caller's own shell may
# have sourced the env file as well; what is to end is Slurm's own programs and what runs in jobs.
members() { # members [daemons]: their process ids
    local file name
    while read -r file; do
        name=$(cat "${file%/environ}/comm" 2>/dev/null) || continue
        if [[ $name == @(slurmctld|slurmd|slurmstepd) ]] ||
            { [[ ${1:-} != daemons ]] && grep -qz '^SLURM_JOB_ID=' "$file" 2>/dev/null; }; then
            file=${file%/environ}
            echo "${file#/proc/}"
        fi
    done < <(grep -lzxF "SLURM_CONF=$dir/slurm.conf" /proc/[0-9]*/environ 2>/dev/null)
}

signal() { # signal NAME PID...
    local name=$1
    shift
    [[ $# == 0 ]] || kill "-$name" "$@" 2>/dev/null || true
}

mapfile -t found < <(members daemons)
signal TERM "${found[@]}"
if [[ -f $dir/munge/pid ]]; then
    signal TERM "$(<"$dir/munge/pid")"
fi
sleep 0.5
for _ in $(seq 20); do
    mapfile -t found < <(members)
    [[ ${#found[@]} -gt 0 ]] || break
    signal KILL "${found[@]}"
    sleep 0.2
done
rm -rf "/tmp/.tucodec-localcluster-$(<"$dir/port")"
# The nodes' cgroups bear the nodes' names only; the last cluster to go takes them along.
if ! compgen -G "/tmp/.tucodec-localcluster-*" >/dev/null; then
    find /sys/fs/cgroup/freezer/slurm_n* -depth -type d -exec rmdir {} + 2>/dev/null || true
fi
rm -rf "$dir"
