"""`tucodec doctor`: what this installation can do, and what would fail in a training, with advice.

With a configuration, run it where the training will run: in a Slurm job it compares the job with the
configuration, and as `srun tucodec doctor …` its tasks also try to reach each other.
"""

import os
import platform
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lightning_tucodec.errors import ConfigError, TucodecError, redacted
from lightning_tucodec.io.files import read_text
from lightning_tucodec.io.processes import cores
from lightning_tucodec.io.storage import Storage

LOCAL_DISKS = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "tmpfs", "overlay", "ramfs"}
"""File systems that one node alone sees."""

GLIBC = (2, 28)
"""What the wheels of PyTorch and NumPy ask for (manylinux_2_28)."""

GLIBC_COMPRESSAI = (2, 34)
"""What CompressAI's wheel asks for; training and coding do without it."""

_GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        name: what was looked at.
        level: `ok`; `warn`, something will be missing; `fail`, a run would not work.
        text: what was found.
        fix: what to do, empty when nothing is needed.
    """

    name: str
    level: Literal["ok", "warn", "fail"]
    text: str
    fix: str = ""


Check = Iterator[Finding]


def check_machine() -> Check:
    """C library and GPU."""
    name, number = platform.libc_ver()
    numbers = tuple(int(part) for part in re.findall(r"\d+", number)[:2])
    if name != "glibc":
        yield Finding("glibc", "warn", f"C library is {name or 'unknown'}", "use a glibc system")
    elif numbers < GLIBC:
        yield Finding("glibc", "fail", number, "wheels need 2.28: run in a container")
    elif numbers < GLIBC_COMPRESSAI:
        yield Finding("glibc", "warn", number, "CompressAI's wheel needs 2.34: build it yourself")
    else:
        yield Finding("glibc", "ok", number)


def check_libraries() -> Check:
    """Python, PyTorch with its devices, and what trainings need besides."""
    import torch

    yield Finding("python", "ok", platform.python_version())
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = f"{gpus} × {torch.cuda.get_device_name(0)}" if gpus else "no GPU"
    yield Finding("torch", "ok", f"{torch.__version__}, {device}, {cores()} cores")
    fix = "pip install 'lightning-tucodec[train]'"
    try:
        yield Finding("training", "ok", f"pytorch-lightning {version('pytorch-lightning')}")
    except PackageNotFoundError:
        yield Finding("training", "warn", "pytorch-lightning is not installed", fix)


def check_coding() -> Check:
    """Models, compiled functions, H.266."""
    from lightning_tucodec.codecs.cards import (
        coding_files,
        folder_problem,
        model_files,
        model_folder,
        read_card,
    )
    from lightning_tucodec.codecs.h266.vvc import Vvc
    from lightning_tucodec.coding import compiling, kernels

    damaged = False
    for path in coding_files():
        try:
            read_card(path)
        except TucodecError as error:
            damaged = True
            yield Finding(
                "models", "fail", str(error), "install again, or remove it if it is yours"
            )
    if not damaged:
        own = f"; your own would be in {folder}" if (folder := model_folder()) else ""
        yield Finding("models", "ok", f"{len(model_files())} can be read{own}")
    if problem := folder_problem():
        yield Finding("models", "warn", problem, "name a folder, or unset TUCODEC_MODELS")
    place, filled = compiling.cache_of(kernels)
    if place is None:
        fix = "set NUMBA_CACHE_DIR to a folder that you may write"
        yield Finding("compiled", "warn", "nowhere to keep it: each process compiles anew", fix)
    elif not filled:
        fix = "tucodec warmup, or the first use takes half a minute more"
        yield Finding("compiled", "warn", f"nothing yet in {place}", fix)
    else:
        yield Finding("compiled", "ok", str(place))
    try:
        codec = Vvc(qp=40, preset="faster")
        codec.decode(codec.encode(np.zeros((64, 64, 3), np.uint8)))
        yield Finding("h266", "ok", codec.describe()["version"])
    except ModuleNotFoundError:
        fix = "pip install 'lightning-tucodec[h266]'"
        yield Finding("h266", "warn", "imageio-ffmpeg is not installed", fix)
    except TucodecError as error:
        yield Finding("h266", "warn", str(error), "vvc and vvc+postfilter will not work")


def check_services() -> Check:
    """Slurm and W&B, which nobody needs."""
    from lightning_tucodec.training.beside.wandb_view import has_key, server

    found = shutil.which("sbatch")
    yield Finding("slurm", "ok", found or "no sbatch here; `tucodec sweep run` trains without")
    key = f"a key for {server()}" if has_key() else "no key; runs are recorded in metrics.jsonl"
    yield Finding("wandb", "ok", key)


def check_data(config: dict[str, Any]) -> Check:
    """Shards, their index, validation images."""
    from lightning_tucodec.training.data import check_crop_size, check_validation
    from lightning_tucodec.training.input.shards import ShardIndex
    from lightning_tucodec.training.runs.identity import arguments

    data = arguments(config, "data")
    if "shards" in data:
        storage = Storage(data["shards"])
        try:
            index = ShardIndex.read(storage)
            sizes = dict(storage.files())
            wrong = [
                name
                for name, size in zip(index.names, index.bytes, strict=True)
                if sizes.get(name) != size
            ]
            if wrong:
                text = f"{storage.location}: {len(wrong)} shards are missing or cut, as {wrong[0]}"
                yield Finding("shards", "fail", text, "tucodec shards verify, then build again")
            else:
                samples = int(index.starts[-1])
                text = f"{storage.location}: {samples} samples in {len(index.names)} shards"
                yield Finding("shards", "ok", text)
                check_crop_size(config)
        except ConfigError as error:
            yield Finding("shards", "fail", str(error), "--data.crop, or build with larger --patch")
        except (TucodecError, OSError) as error:
            yield Finding("shards", "fail", str(error), "tucodec shards build, or --data.shards")
    images = data.get("val_images")
    if images is None:
        yield Finding("validation", "warn", "no images", "name a folder with --data.val_images")
    else:
        try:
            count = check_validation(config)
            text = f"{images}: not looked at" if count is None else f"{images}: {count} images"
            yield Finding("validation", "ok", text)
        except TucodecError as error:
            yield Finding("validation", "fail", str(error), "mend it, or --data.val_images")


def check_start(config: dict[str, Any]) -> Check:
    """The checkpoint or weights that the run would start from."""
    from lightning_tucodec.training.configuration import check_config
    from lightning_tucodec.training.runs.folder import RunFolder
    from lightning_tucodec.training.runs.identity import identity
    from lightning_tucodec.training.runs.manifest import Manifest

    try:
        check_config(config)
        folder = RunFolder.of(config)
        Manifest(folder).check(identity(config))
    except TucodecError as error:
        yield Finding("run", "fail", str(error), "see the message")
        return
    found = folder.latest()
    step = None if found is None else found[1]["tucodec"]["opt_step"]
    text = "starts" if step is None else f"goes on at step {step}"
    yield Finding("run", "ok", f"{folder.path}: {text}")


def file_system(path: Path) -> str:
    """Type of the file system that holds a path; empty when that is unknown."""
    try:
        mounts = Path("/proc/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    best, kind = "", ""
    for line in mounts:
        _, point, name, *_ = line.split()
        inside = path == Path(point) or Path(point) in path.parents
        if inside and len(point) >= len(best):
            best, kind = point, name
    return kind


def check_storage(config: dict[str, Any], nodes: int) -> Check:
    """The parent of run folders: writable, with room, seen by all nodes; the mirror."""
    runs = Path(config["run"]["runs_dir"]).absolute()
    present = next(p for p in (runs, *runs.parents) if p.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=present) as stream:
            stream.write(b"x" * 4096)
            os.fsync(stream.fileno())
        yield Finding("runs_dir", "ok", f"{runs}: writable")
    except OSError as error:
        text = f"{present}: {error.strerror}"
        yield Finding("runs_dir", "fail", text, "choose another with --run.runs_dir")
    free = shutil.disk_usage(present).free
    text = f"{free / _GIB:.1f} GiB free at {present}"
    if free < 0.5 * _GIB:
        yield Finding("disk", "fail", text, "make room: a run keeps three checkpoints at a time")
    elif free < 5 * _GIB:
        yield Finding("disk", "warn", text, "a `paper` model keeps up to 2 GiB of checkpoints")
    else:
        yield Finding("disk", "ok", text)
    kind = file_system(present.resolve())
    if nodes > 1 and kind in LOCAL_DISKS:
        text = f"{runs} is on {kind}, which the other {nodes - 1} nodes do not see"
        yield Finding("shared storage", "fail", text, "put run.runs_dir on shared storage")
    else:
        yield Finding("shared storage", "ok", f"{kind or 'unknown file system'}, {nodes} node(s)")
    if mirror := config["run"].get("mirror"):
        from lightning_tucodec.training.beside.pull import check_writable

        try:
            check_writable(mirror)
            yield Finding("mirror", "ok", f"{mirror}: writable")
        except TucodecError as error:
            yield Finding("mirror", "fail", str(error), "check the URL and credentials")


def check_slurm(config: dict[str, Any], script: Path | None) -> Check:
    """The job against the configuration; signal and requeue."""
    trainer = config["trainer"]
    environment = os.environ
    if "SLURM_JOB_ID" in environment:
        tasks = int(environment.get("SLURM_NTASKS", "1"))
        nodes = int(environment.get("SLURM_JOB_NUM_NODES", environment.get("SLURM_NNODES", "1")))
        devices = trainer["devices"]
        wanted = int(trainer["num_nodes"]) * (int(devices) if str(devices).isdigit() else 1)
        text = f"{tasks} tasks on {nodes} nodes"
        if str(devices).isdigit() and wanted != tasks:
            fix = f"--trainer.num_nodes {nodes} --trainer.devices {max(1, tasks // nodes)}"
            yield Finding("tasks", "fail", f"{text}, but {wanted} in the configuration", fix)
        elif tasks > 1 and "SLURM_NTASKS_PER_NODE" not in environment:
            fix = "sbatch --ntasks-per-node=N (not --ntasks)"
            yield Finding("tasks", "fail", f"{text}, SLURM_NTASKS_PER_NODE is not set", fix)
        else:
            yield Finding("tasks", "ok", text)
        yield from _requeue(environment["SLURM_JOB_ID"])
    else:
        yield Finding("slurm", "ok", "not in a job")
    if script is not None:
        yield from _script(script)


def _requeue(job: str) -> Check:
    try:
        done = subprocess.run(
            ["scontrol", "show", "job", job], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        text = "no scontrol here; a job that exits with 75 is not requeued from the node"
        yield Finding("requeue", "warn", text, "submit again by hand, or with `sweep retry`")
        return
    if "Requeue=1" in done.stdout.split():
        yield Finding("requeue", "ok", "the job may be requeued")
    else:
        yield Finding("requeue", "fail", "the job may not be requeued", "sbatch --requeue")


def _script(path: Path) -> Check:
    """What a batch script asks of Slurm."""
    try:
        text = read_text(path)
    except ConfigError as error:
        yield Finding("script", "fail", str(error), "--script FILE")
        return
    signal = re.search(r"--signal[= ]['\"]?([A-Z]+:)?(\w+)(?:@(\d+))?", text)
    if signal is None:
        fix = "sbatch --signal=USR1@300, so that the run saves before the time limit"
        yield Finding("signal", "fail", f"{path}: no --signal", fix)
    elif signal[1] and "B" in signal[1] and "srun" in text and "trap" not in text:
        fix = "without B:, or the script must pass the signal on to srun"
        yield Finding("signal", "fail", f"{path}: {signal[0]} reaches the batch shell only", fix)
    elif signal[2].removeprefix("SIG") not in {"USR1", "TERM", "INT"}:
        yield Finding("signal", "fail", f"{path}: {signal[0]}", "use USR1")
    elif int(signal[3] or 60) < 60:
        fix = "one step, one validation and one save must fit: 300 seconds are safe"
        yield Finding("signal", "warn", f"{path}: {signal[0]}", fix)
    else:
        yield Finding("signal", "ok", signal[0])
    if re.search(r"--requeue\b", text):
        yield Finding("requeue option", "ok", "--requeue")
    else:
        yield Finding("requeue option", "fail", f"{path}: no --requeue", "sbatch --requeue")


def check_ranks(config: dict[str, Any], seconds: float = 60.0) -> Check:
    """The processes of a run must reach each other: one sum over gloo, and over NCCL with GPUs."""
    import torch
    from lightning_fabric.plugins.environments import SLURMEnvironment

    from lightning_tucodec.training.runs.launcher import started_by_srun

    accelerator = str(config["trainer"]["accelerator"])
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if accelerator in {"gpu", "cuda"} and gpus == 0:
        yield Finding("gpu", "fail", "no GPU that PyTorch can use", "check the job and the driver")
    elif gpus:
        yield Finding("gpu", "ok", f"{gpus} × {torch.cuda.get_device_name(0)}")
    rank, world, address, port = 0, 1, "127.0.0.1", 0
    if started_by_srun() and int(os.environ["SLURM_STEP_NUM_TASKS"]) > 1:
        place = SLURMEnvironment(auto_requeue=False)
        rank, world = place.global_rank(), place.world_size()
        address, port = place.main_address, place.main_port
    for backend in ["gloo"] + (["nccl"] if gpus else []):
        try:
            limit = timedelta(seconds=seconds)
            store = torch.distributed.TCPStore(address, port, world, rank == 0, limit)
            torch.distributed.init_process_group(
                backend, store=store, rank=rank, world_size=world, timeout=limit
            )
            device = f"cuda:{rank % gpus}" if backend == "nccl" else "cpu"
            one = torch.ones(1, device=device)
            torch.distributed.all_reduce(one)
            total = int(one.item())
            torch.distributed.destroy_process_group()
            name = f"{total} of {world} ranks meet at {address}"
            yield Finding(backend, "ok" if total == world else "fail", name)
        # Each backend has its own errors; all of them mean that a run would hang or die.
        except Exception as error:
            text = f"{address}: {' '.join(str(error).split())[:160]}"
            fix = "set MASTER_ADDR and GLOO_SOCKET_IFNAME / NCCL_SOCKET_IFNAME to the right network"
            yield Finding(backend, "fail", text, fix)
        port += 1 if port else 0


def check_wandb(config: dict[str, Any]) -> Check:
    """Tracking never stops a run, so nothing here fails."""
    if not config["run"].get("wandb"):
        yield Finding("wandb", "ok", "not asked for; metrics.jsonl has everything")
        return
    from lightning_tucodec.training.beside.wandb_view import has_key, server

    if not has_key():
        fix = "set WANDB_API_KEY or `wandb login`, or send the run later with `tucodec wandb-sync`"
        yield Finding("wandb", "warn", "no key: offline", fix)
        return
    url = server()
    host, _, port = url.partition("://")[2].partition("/")[0].partition(":")
    try:
        number = int(port or (443 if url.startswith("https") else 80))
        socket.create_connection((host, number), timeout=5).close()
        yield Finding("wandb", "ok", f"there is a key, {host} answers")
    except (OSError, ValueError) as error:
        fix = "run offline (WANDB_MODE=offline) and send later with `tucodec wandb-sync`"
        yield Finding("wandb", "warn", f"{host} does not answer from here ({error})", fix)


def examine(config: dict[str, Any] | None, script: Path | None) -> list[Finding]:
    """All checks of a training; without a configuration what this installation can do."""
    findings = list(check_machine())
    if config is None:
        findings += [*check_libraries(), *check_coding(), *check_services()]
        return findings + (list(_script(script)) if script else [])
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", config["trainer"]["num_nodes"]))
    checks: list[Callable[[], Check]] = [
        lambda: check_data(config),
        lambda: check_start(config),
        lambda: check_storage(config, nodes),
        lambda: check_slurm(config, script),
        lambda: check_ranks(config),
        lambda: check_wandb(config),
    ]
    findings += [finding for check in checks for finding in check()]
    return [replace(finding, text=redacted(finding.text)) for finding in findings]


def table_text(findings: list[Finding]) -> str:
    """One line a finding, and its fix below."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:<4}  {finding.name:<{width}}  {finding.text}")
        if finding.fix and finding.level != "ok":
            lines.append(f"{'':<4}  {'':<{width}}  → {finding.fix}")
    return "\n".join(lines)
