#!/usr/bin/env bash
# A private Slurm cluster on this machine, to try sweeps on a laptop and for the tests.
#
#   slurm/localcluster/start.sh DIR [NODES [CPUS]]     (2 nodes of 4 processors by default)
#   source DIR/env                                     then: sinfo, sbatch, tucodec sweep ...
#   slurm/localcluster/stop.sh DIR                     stops everything and removes DIR
#
# One controller, NODES node daemons and their own munge, all on 127.0.0.1 with free ports; several such
# clusters can run side by side, and none touches /etc/slurm. The nodes are names only: processors are
# counted, not bound. Needs the packages slurm-wlm and munge; runs as any user. Partition `normal` is the
# default, jobs of partition `urgent` preempt it. FINISH=N (seconds, 20): what a job is given to save itself.
# PROCTRACK=cgroup|linuxproc: how Slurm finds a job's processes. With cgroup, as most sites have it, signals reach
# only the processes that Slurm started itself; that is the default where cgroups of version 1 can be written to.
# MAX_ARRAY=N (1001): MaxArraySize of the cluster.
set -euo pipefail

if [[ $# -lt 1 || $1 == -h || $1 == --help ]]; then
    sed -n '2,14s/^# \{0,1\}//p' "$0"
    exit 2
fi
for program in munged slurmctld slurmd sbatch; do
    if ! PATH=$PATH:/usr/sbin:/sbin command -v "$program" >/dev/null; then
        echo "localcluster: $program is not installed; on Debian: apt-get install slurm-wlm munge" >&2
        exit 1
    fi
done
PATH=$PATH:/usr/sbin:/sbin
here=$(cd "$(dirname "$0")" && pwd)
nodes=${2:-2}
cpus=${3:-4}
finish=${FINISH:-20}
groups=/sys/fs/cgroup
tracker=linuxproc
[[ ! -w $groups/freezer/tasks ]] || tracker=cgroup
tracker=${PROCTRACK:-$tracker}
if [[ $tracker != @(cgroup|linuxproc) ]]; then
    echo "localcluster: PROCTRACK=$tracker: cgroup or linuxproc" >&2
    exit 2
fi
if [[ -e $1 && -n $(ls -A "$1" 2>/dev/null) ]]; then
    echo "localcluster: $1 is not empty" >&2
    exit 1
fi
umask 022
mkdir -p "$1"
dir=$(cd "$1" && pwd)
user=$(id -un)

is_free() { ! (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
# A block of ports that nobody listens on. Two clusters that start at the same moment draw different ones.
while :; do
    port=$((20000 + (RANDOM * 32768 + RANDOM) % 1000 * 10))
    # Sockets are here, as their paths may have 107 characters and no more: DIR may be as long as it likes.
    short=/tmp/.tucodec-localcluster-$port
    mkdir -m 755 "$short" 2>/dev/null || continue
    for ((i = 0; i <= nodes; i++)); do
        is_free $((port + i)) || break
    done
    ((i > nodes)) && break
    rmdir "$short"
done
echo "$port" >"$dir/port"
trap '[[ $? == 0 ]] || "$here/stop.sh" "$dir" >/dev/null' EXIT

# munge refuses sockets below folders that others may write to, such as /tmp, unless --force.
mkdir -m 700 "$dir/munge"
mkdir -m 755 "$dir/state" "$dir/log"
dd if=/dev/urandom of="$dir/munge/key" bs=128 count=1 status=none
chmod 400 "$dir/munge/key"
munged --force --key-file="$dir/munge/key" --socket="$short/munge" --num-threads=2 \
    --pid-file="$dir/munge/pid" --log-file="$dir/munge/log" --seed-file="$dir/munge/seed" 2>"$dir/munge/start"

{
    cat <<CONF
ClusterName=local$port
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
CryptoType=crypto/munge
# A requeued job waits until its old credential has expired: by default two minutes, at least five seconds.
AuthInfo=socket=$short/munge,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$short/%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd-%n.log
# Ports of DDP follow from the last four digits of job ids, cgroups from all: clusters side by side differ in both.
FirstJobId=$((port * 1000 + port / 10 % 100 * 100 + 1))
ProctrackType=proctrack/$tracker
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=$finish
InactiveLimit=0
SlurmdTimeout=12
SlurmctldTimeout=30
MessageTimeout=30
MinJobAge=3600
ReturnToService=2
MaxArraySize=${MAX_ARRAY:-1001}
# Time limits are looked at every half minute; a job may overrun by nothing.
OverTimeLimit=0
CONF
    for ((i = 1; i <= nodes; i++)); do
        echo "NodeName=n$i NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((port + i)) CPUs=$cpus RealMemory=1024"
    done
    echo "PartitionName=normal Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=$finish MaxTime=UNLIMITED State=UP"
    echo "PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=UNLIMITED State=UP"
} >"$dir/slurm.conf"

cat >"$dir/cgroup.conf" <<CONF
CgroupPlugin=cgroup/v1
CgroupMountpoint=$groups
CgroupAutomount=no
CONF
cat >"$dir/site.sh" <<SITE
# Site file of the local cluster: two processes, one a node, that talk over the loopback.
SITE_SBATCH="--partition=normal"
SITE_NODES=$nodes
SITE_TASKS_PER_NODE=1
SITE_CPUS_PER_TASK=1
SITE_TIME=1-00:00:00
SITE_FENCE_SECONDS=3 # one file system
SITE_ACCELERATOR=cpu
export MASTER_ADDR=127.0.0.1 # the nodes' names do not resolve
export GLOO_SOCKET_IFNAME=lo
SITE
cat >"$dir/env" <<ENV
export SLURM_CONF=$dir/slurm.conf
export TUCODEC_SITE=$dir/site.sh
ENV

export SLURM_CONF=$dir/slurm.conf
slurmctld
for ((i = 1; i <= nodes; i++)); do
    mkdir -p "$short/n$i"
    slurmd -N "n$i"
done
for ((i = 0; i < 300; i++)); do
    if [[ $(sinfo --noheader --partition=normal --Node --format=%T 2>/dev/null | grep -c idle) == "$nodes" ]]; then
        echo "$nodes nodes are up: source $dir/env"
        exit 0
    fi
    sleep 0.2
done
echo "localcluster: the nodes did not come up; last lines of the logs:" >&2
tail -n 5 "$dir"/log/*.log >&2
exit 1
