"""A run's manifest: what code ran on which machines, and how each attempt ended."""

import contextlib
import json
import os
import platform
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from lightning_tucodec.errors import ConfigError, redacted
from lightning_tucodec.io.temporary import atomic_write
from lightning_tucodec.training.runs.folder import MANIFEST, RunFolder
from lightning_tucodec.training.runs.identity import (
    digest,
    identity,
    plain,
)
from lightning_tucodec.training.runs.launcher import (
    ANNOUNCE_SECONDS,
    attempt_key,
    slurm_ids,
    tell_launcher,
)

_PACKAGES = (
    "lightning-tucodec", "torch", "pytorch-lightning", "numpy", "numba", "pillow", "webdataset",
    "fsspec", "wandb", "jsonargparse",
)  # fmt: skip
_DIFF_LIMIT = 1 << 20  # characters of a diff that are kept
_MAX_WITHOUT_PROGRESS = 2  # starts that were killed or failed
_MAX_STOPPED = 10  # starts that were told to stop
_STOPPED = ("preempted", "killed", "failed")
PREEMPTED = 75
"""Exit status of a run that saved itself and wants to be started again (sysexits' EX_TEMPFAIL)."""

ECHO = "another process ended first"
"""How an attempt's error begins that is not the cause."""


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
        tell_launcher()

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
        deadline = time.monotonic() + ANNOUNCE_SECONDS
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
