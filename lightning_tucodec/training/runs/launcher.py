"""What started this process: Slurm, torchrun or Lightning, and how ranks of one start know each other."""

import json
import os
import sys
import time
import uuid
from datetime import timedelta

from lightning_tucodec.io.once import once

ANNOUNCE_SECONDS = (
    1800.0  # seconds to wait for rank 0, which may be fetching a checkpoint from far away
)


def tell_launcher() -> None:
    """Tell slurm/train.sh that training begins; it counts the starts that are killed before that."""
    path = os.environ.get("TUCODEC_ATTEMPTS")
    if path is None or not started_by_srun():
        return
    try:
        with open(path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps({"event": "begun", "time": int(time.time())}) + "\n")
    except OSError as error:
        print(f"tucodec: {path}: {error.strerror}", file=sys.stderr, flush=True)


def slurm_ids() -> dict[str, str]:
    """What Slurm says about this job; empty outside of it."""
    names = (
        "JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID", "RESTART_COUNT", "STEP_ID", "NTASKS", "NNODES",
        "JOB_NODELIST", "JOB_PARTITION", "CLUSTER_NAME",
    )  # fmt: skip
    found = {name.lower(): os.environ.get(f"SLURM_{name}") for name in names}
    return {name: value for name, value in found.items() if value is not None}


def attempt_key() -> str | None:
    """A key that all ranks of one start of the run share; None where starts cannot be distinguished."""
    if "TUCODEC_ATTEMPT" in os.environ:  # set by rank 0 for the ranks that Lightning starts
        return os.environ["TUCODEC_ATTEMPT"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return _torchrun_key(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if started_by_srun():
        names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
        return "/".join(os.environ.get(name, "0") for name in names)
    return None


def started_by_srun() -> bool:
    """Whether Slurm gave this process its rank; batch scripts and shells of salloc have only their job's."""
    return "SLURM_STEP_NUM_TASKS" in os.environ


@once
def _torchrun_key(restart: str) -> str:
    """A key that rank 0 draws for all ranks of torchrun, whose own id is `none` unless the user gives one."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return f"{os.environ['TORCHELASTIC_RUN_ID']}/{restart}"
    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=ANNOUNCE_SECONDS))
    name = f"tucodec/attempt/{restart}"
    if os.environ["RANK"] == "0":
        store.set(name, uuid.uuid4().hex)
    return str(store.get(name).decode())
