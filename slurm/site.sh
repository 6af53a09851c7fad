# shellcheck shell=bash disable=SC2034
# The site file: it describes a cluster to the launchers. Edit this file, or copy it and set TUCODEC_SITE to the copy.
# bash sources it on the node that submits and on the nodes that run jobs.

# Options of sbatch for training jobs: partition, account, GPUs, memory, nodes to avoid.
SITE_SBATCH="--gpus-per-node=8"
# The same for jobs without a GPU (planning, shards); empty: the cluster's defaults.
SITE_SBATCH_CPU=""

# Training: nodes per task, processes per node (one per GPU), processors per process.
SITE_NODES=1
SITE_TASKS_PER_NODE=8
SITE_CPUS_PER_TASK=6
# Time limit of a job. A task that needs longer saves and resumes in a new job.
SITE_TIME=1-00:00:00
# Seconds before the time limit at which a task gets the signal to save.
SITE_SIGNAL_SECONDS=300
# A job that was restarted this many times is not requeued again.
SITE_MAX_RESTARTS=100
# Seconds after which a line written on one node is visible on all others; NFS caches for up to a minute.
SITE_FENCE_SECONDS=66

# `--trainer.accelerator`, to override the recipe: cpu, gpu.
SITE_ACCELERATOR=""
# Put before every command, e.g. "apptainer exec --nv /images/tucodec.sif".
SITE_CONTAINER=""
# The command itself; empty: .venv/bin/tucodec of this repository when it is there, else tucodec.
SITE_TUCODEC=""
# The tasks of an array start so many seconds after one another (sixteen steps, then from zero again).
SITE_STAGGER_SECONDS=2

# Run before every command: modules, proxies, caches.
site_setup() {
    : # module load cuda
}
