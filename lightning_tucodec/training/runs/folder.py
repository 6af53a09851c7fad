"""A run: its folder, its manifest and how it resumes.

A run's folder is `<runs_dir>/<name>-<run_id>`, run_id a hash of everything that decides the result. The same
config finds the same folder and resumes there, without a further option.
"""

import contextlib
import fcntl
import json
import os
import platform
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import yaml

from lightning_tucodec.errors import ConfigError, redacted
from lightning_tucodec.io.files import check_name, read_json_lines
from lightning_tucodec.io.once import once
from lightning_tucodec.io.temporary import atomic_write
from lightning_tucodec.quality.curves import decibels
from lightning_tucodec.training.runs.identity import (
    digest,
    identity,
    plain,
    run_id,
    without_credentials,
)
from lightning_tucodec.training.runs.weights import CHECKPOINTS, load_checkpoint

MANIFEST = "manifest.json"
_PACKAGES = (
    "lightning-tucodec", "torch", "pytorch-lightning", "numpy", "numba", "pillow", "webdataset",
    "fsspec", "wandb", "jsonargparse",
)  # fmt: skip
_DIFF_LIMIT = 1 << 20  # characters of a diff that are kept
_OWN_START = 120.0  # seconds to wait for whoever still holds the folder
_MAX_WITHOUT_PROGRESS = 2  # starts that were killed or failed
_MAX_STOPPED = 10  # starts that were told to stop
_STOPPED = ("preempted", "killed", "failed")
ECHO = "another process ended first"
"""How an attempt's error begins that is not the cause."""
_ANNOUNCE = 1800.0  # seconds to wait for rank 0, which may be fetching a checkpoint from far away


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a metrics file; what a kill has cut short, or is no such line, is left out."""
    rows = read_json_lines(path)
    return [row for row in rows if isinstance(row, dict) and type(row.get("opt_step")) is int]


def validation_point(rows: Sequence[dict[str, Any]]) -> tuple[float, float, float | None] | None:
    """bpp, PSNR and MS-SSIM in dB of the last validation; real files where they were written.

    Args:
        rows: lines of `metrics.jsonl`.
    """
    for row in reversed(rows):
        bpp, psnr = row.get("val/real_bpp", row.get("val/bpp")), row.get("val/psnr")
        if bpp is not None and psnr is not None:
            similarity = row.get("val/ms_ssim")
            in_decibels = None if similarity is None else float(decibels(similarity))
            return float(bpp), float(psnr), in_decibels
    return None


class RunFolder:
    """The folder of one run: config.yaml, manifest.json, metrics.jsonl, checkpoints/, images/."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.images = path / "images"

    @classmethod
    def of(cls, config: dict[str, Any]) -> "RunFolder":
        """The folder that this config always gets.

        Raises:
            ConfigError: `run.name` is no name; and see `identity`.
        """
        name = f"{check_name(config['run']['name'], 'run.name')}-{run_id(config)}"
        return cls(Path(config["run"]["runs_dir"]) / name)

    def write_config(self, config: dict[str, Any]) -> None:
        """Leave the fully resolved config, without credentials, beside the results."""
        with atomic_write(self.path / "config.yaml", "w") as stream:
            yaml.safe_dump(without_credentials(config), stream, sort_keys=False, allow_unicode=True)

    def latest(self) -> tuple[Path, dict[str, Any]] | None:
        """Newest checkpoint that loads, with its content; None when there is none to go on from.

        A damaged one is named on stderr, and the generation before it is taken.
        """
        for name in CHECKPOINTS:
            path = self.checkpoints / name
            if path.exists():
                try:
                    return path, load_checkpoint(path)
                except ConfigError as error:
                    print(f"tucodec: {error}; trying an older one", file=sys.stderr, flush=True)
        return None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training in this folder; the kernel drops the lock of the dead.

        A run that is refused before it begins leaves no folder.

        Raises:
            ConfigError: another one does not end.
        """
        missing = [path for path in (self.path, *self.path.parents) if not path.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        with self._lock():
            try:
                yield
            finally:
                if not (self.path / MANIFEST).exists():
                    self._remove(missing)

    def _remove(self, folders: Sequence[Path]) -> None:
        """Take a folder away in which nothing has begun, and parents that were made for it."""
        with contextlib.suppress(OSError):
            if any(path.name not in (".lock", "checkpoints") for path in self.path.iterdir()):
                return
            if self.checkpoints.exists():
                self.checkpoints.rmdir()
            (self.path / ".lock").unlink()
            for path in folders or (self.path,):
                path.rmdir()

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        deadline = time.monotonic() + _OWN_START
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            with open(self.path / ".lock", "a+", encoding="utf-8") as stream:
                if self._acquire(stream, deadline):
                    yield
                    return

    def _acquire(self, stream: TextIO, deadline: float) -> bool:
        """Whether the lock is ours; not if its last holder has taken the file away with the folder."""
        told = False
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                stream.seek(0)
                holder = stream.read().strip() or "another process"
                left = deadline - time.monotonic()
                if left < 0:
                    raise ConfigError(
                        f"{self.path}: {holder} trains this run; stop it first, or change the config"
                    ) from None
                if not told:
                    told = True
                    print(
                        f"run {self.path}: waits for {holder}, which trains it, at most {left:.0f} s",
                        file=sys.stderr,
                        flush=True,
                    )
                time.sleep(0.5)
            except OSError:  # a file system without locks
                return True
            else:
                if os.fstat(stream.fileno()).st_nlink == 0:
                    return False
                stream.truncate(0)
                stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                stream.flush()
                return True


class Manifest:
    """`manifest.json`: what code ran on which machines, and how each attempt ended.

        run_id, name, identity, created
        code: one entry for each state of the code and its packages that took part
        attempts: start, end, host, pid, world_size, slurm, code, from_step, from_images, step, exit,
            status, error

    `exit` is null while an attempt runs, then `finished`, `preempted (SIGUSR1)`, `failed` or, found out by
    the next attempt, `killed`.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.path = folder.path / MANIFEST

    def read(self) -> dict[str, Any]:
        """Its content; empty when there is none or it is damaged."""
        try:
            return _manifest(self.path.read_bytes())
        except OSError:
            return {}

    def check(self, own: dict[str, Any]) -> None:
        """Refuse a folder that belongs to another configuration.

        Args:
            own: `identity` of the config at hand.

        Raises:
            ConfigError: what differs.
        """
        theirs = self.read().get("identity")
        own = plain(own)
        if theirs is not None and theirs != own:
            lines = ", ".join(differences(theirs, own))
            raise ConfigError(
                f"{self.path.parent}: was begun with another configuration ({lines}); give the run "
                "another name or remove the folder"
            )

    def begin(
        self, config: dict[str, Any], from_step: int, world_size: int, from_images: int = 0
    ) -> None:
        """Add this attempt, before the first step.

        Args:
            config: resolved.
            from_step: steps of the state that it goes on from.
            world_size: number of processes.
            from_images: images that this state has seen; a GAN's discriminator learns between two steps.

        Raises:
            ConfigError: this job was restarted repeatedly at this step, and killed or stopped before it got
                further.
        """
        own = identity(config)
        content = self.read() or {"created": _now()}
        content |= {"run_id": digest(own), "name": config["run"]["name"], "identity": own}
        codes = content.setdefault("code", [])
        code = _code()
        if code not in codes:
            codes.append(code)
        attempts = content.setdefault("attempts", [])
        for attempt in attempts:
            if attempt["exit"] is None:
                attempt["exit"] = "killed"
        if _restarts_without_progress(attempts, from_step, from_images) >= _MAX_WITHOUT_PROGRESS:
            raise ConfigError(
                f"{self.path.parent}: {_MAX_WITHOUT_PROGRESS} starts of this job in a row were killed or "
                f"failed at step {from_step} before they could save: out of memory? see the log; when the "
                "cause is gone, submit it again"
            )
        if _restarts_without_progress(attempts, from_step, from_images, _STOPPED) >= _MAX_STOPPED:
            raise ConfigError(
                f"{self.path.parent}: {_MAX_STOPPED} starts of this job in a row were told to stop at "
                f"step {from_step} before a step or its validation was done: its jobs are too short "
                "(SITE_TIME, SITE_SIGNAL_SECONDS); submitted again it goes on"
            )
        attempts.append(
            {
                "start": _now(), "end": None, "host": socket.gethostname(), "pid": os.getpid(),
                "world_size": world_size, "slurm": slurm_ids(), "key": attempt_key(),
                "code": codes.index(code), "from_step": from_step,
                "from_images": from_images, "step": None, "exit": None, "status": None, "error": None,
            }
        )  # fmt: skip
        self._write(content)
        _tell_launcher()

    def end(self, step: int | None, reason: str, status: int, error: str | None) -> None:
        """Record how this process's attempt ended, also when the disk is full."""
        content = self.read()
        for attempt in reversed(content.get("attempts", [])):
            if attempt["pid"] == os.getpid() and attempt["host"] == socket.gethostname():
                attempt |= {"end": _now(), "step": step, "exit": reason, "status": status,
                            "error": error}  # fmt: skip
                with contextlib.suppress(OSError):
                    self._write(content)
                return

    def overtaken(self) -> bool:
        """Whether the run has been started elsewhere since this process announced its attempt."""
        attempts = self.read().get("attempts", [])
        own = (os.getpid(), socket.gethostname())
        return bool(attempts) and (attempts[-1]["pid"], attempts[-1]["host"]) != own

    def merge(self, data: bytes) -> None:
        """Add what another cluster wrote about this run; nothing when that is damaged."""
        own, other = self.read(), _manifest(data)
        if not other:
            return
        codes, attempts = other["code"], other["attempts"]
        known = {(a["start"], a["host"], a["pid"]) for a in attempts}
        for attempt in own.get("attempts", []):
            if (attempt["start"], attempt["host"], attempt["pid"]) not in known:
                code = own["code"][attempt["code"]]
                if code not in codes:
                    codes.append(code)
                attempts.append({**attempt, "code": codes.index(code)})
        attempts.sort(key=lambda attempt: attempt["start"])
        self._write(other)

    def wait_for_rank_0(self, told: Callable[[], bool]) -> None:
        """Return once rank 0 of this attempt has announced it, and so has fetched what there is.

        Args:
            told: whether this process was told to stop.

        Raises:
            ConfigError: it has not, or this node does not see its folder.
            SystemExit: it was told to stop; there is nothing to save yet.
        """
        key = attempt_key()
        deadline = time.monotonic() + _ANNOUNCE
        while key is not None:
            attempts = self.read().get("attempts", [])
            if attempts and attempts[-1].get("key") == key:
                return
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"{self.path}: rank 0 does not show up in it; run.runs_dir must be on storage "
                    "that all nodes share"
                )
            if told():
                from lightning_tucodec.training.runs.preemption import PREEMPTED

                raise SystemExit(PREEMPTED)
            time.sleep(0.2)

    def _write(self, content: dict[str, Any]) -> None:
        with atomic_write(self.path, "w") as stream:
            json.dump(content, stream, indent=1, default=str)


_ATTEMPT = {"start": str, "host": str, "pid": int, "code": int, "exit": str | None}
"""Entries of an attempt that are looked at: what tells it from others, its place in `code`, its end."""


def _manifest(data: bytes) -> dict[str, Any]:
    """A manifest, from here or from elsewhere; empty when it is damaged."""
    try:
        content = {"code": [], "attempts": [], **json.loads(data)}
        codes, attempts = content["code"], content["attempts"]
        sound = (
            isinstance(codes, list)
            and isinstance(attempts, list)
            and all(
                isinstance(attempt[name], kind)
                for attempt in attempts
                for name, kind in _ATTEMPT.items()
            )
            and all(0 <= attempt["code"] < len(codes) for attempt in attempts)
        )
    except (ValueError, LookupError, TypeError, RecursionError):
        return {}
    return content if sound else {}


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """One `name: old -> new` for every leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in sorted(old.keys() | new.keys())
            for line in differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if old == new else [f"{name}: {old} -> {new}"]


def _restarts_without_progress(
    attempts: Sequence[dict[str, Any]],
    step: int,
    images: int,
    exits: tuple[str, ...] = ("killed", "failed"),
) -> int:
    """How many starts of this job of Slurm, the latest ones in a row, ended so without getting further."""
    job, restart = (os.environ.get(f"SLURM_{name}") for name in ("JOB_ID", "RESTART_COUNT"))
    count = 0
    for attempt in reversed(attempts):
        slurm = attempt["slurm"]
        # Starts by hand inside one allocation share its number of restarts; they are nobody's loop.
        before = int(restart or 0) - 1 - count
        if (
            job is None
            or (slurm.get("job_id"), int(slurm.get("restart_count", 0))) != (job, before)
            or (attempt["from_step"], attempt.get("from_images", images)) != (step, images)
            or not str(attempt["exit"]).startswith(exits)
        ):
            break
        count += 1
    return count


def _tell_launcher() -> None:
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
    """The same on all ranks of one start of the run; None when nothing tells starts apart."""
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
    """A word of rank 0 for all ranks that torchrun starts: its own id is `none` unless the user gives one."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return f"{os.environ['TORCHELASTIC_RUN_ID']}/{restart}"
    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=_ANNOUNCE))
    name = f"tucodec/attempt/{restart}"
    if os.environ["RANK"] == "0":
        store.set(name, uuid.uuid4().hex)
    return str(store.get(name).decode())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _code() -> dict[str, Any]:
    """Commit and changes of the checkout that this package runs from, if it is one, and versions."""
    packages = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            packages[name] = metadata.version(name)
    root = Path(__file__).parents[3]
    commit = _git(root, "rev-parse", "HEAD") if (root / ".git").exists() else None
    diff = _git(root, "diff", "HEAD") if commit else None
    return {
        "commit": commit.strip() if commit else None,
        "diff": redacted(diff[:_DIFF_LIMIT]) if diff else None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
    }


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace")
