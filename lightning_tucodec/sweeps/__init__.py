"""Sweeps: from a file of stages and grids to one immutable configuration per task, and to jobs in Slurm.

A plan is a folder `sweeps/<name>-<id>`, the id a hash of all resolved configurations:

    plan.yaml            tasks, where each starts from, labels; a key that is part of its jobs' names
    configs/TASK.yaml    what `tucodec fit` gets; that of a task which starts from another task's weights is
                         written when that one has finished (the run's id depends on the weights)
    waiting/TASK.yaml    the same without those weights
    runs/TASK            link to the run folder, from the moment that the configuration is final
    attempts/TASK.jsonl  a line at each start and end of a job (slurm/train.sh writes it), and where
                         training begins
    logs/TASK.log        what its jobs printed

A task is complete when its last line in attempts/ is an end with status 0.
"""
