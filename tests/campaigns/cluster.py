"""Hits: a task on a real Slurm cluster that is stopped, moved and killed must end as if it had not been.

    python -m tests.campaigns.cluster --hits 32 --seed 2

Clusters of two nodes (slurm/localcluster) train a small network by DDP over two processes. A case is hit
once by each kind, in an order and at optimiser steps that follow from seed and case, as nearly as watching a
file allows. Its weights, optimiser state, counters and metrics must then equal those of the run that nothing
hit, to the last bit. Each case has a cluster of its own. Counts go to docs/campaigns.json under the key
"cluster" as each case ends; a campaign that was killed goes on with the others. The exit status is 1 when
any case broke the rule.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image

from lightning_tucodec.io.files import read_json_lines
from lightning_tucodec.io.temporary import atomic_write
from lightning_tucodec.sweeps.plan import Plan
from lightning_tucodec.sweeps.queue import Job, queued
from tests.support import MICRO, PHOTOS, photo

REPOSITORY = Path(__file__).parents[2]
RESULTS = REPOSITORY / "docs" / "campaigns.json"
STEPS = 240
PATIENCE = 900.0
"""Seconds to wait for anything; a machine that others use may be ten times slower than a quiet one."""


_ENVIRONMENT = threading.Lock()
_ENDING = threading.Event()
"""The campaign was told to end; whoever waits in another thread gives up and stops its cluster."""


def missing_programs() -> str:
    """Why no cluster can be started here; empty if one can."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [
        name
        for name in ("munged", "slurmctld", "slurmd", "sbatch")
        if not shutil.which(name, path=path)
    ]
    return (
        f"not installed: {', '.join(missing)} (apt-get install slurm-wlm munge)" if missing else ""
    )


def wait_for(what: str, condition: Callable[[], Any], every: float = 0.1) -> Any:
    """Ask until the answer is true, and return it.

    Raises:
        TimeoutError: it never was.
        RuntimeError: the campaign ends.
    """
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if _ENDING.is_set():
            raise RuntimeError(f"the campaign ends; waited for {what}")
        found = condition()
        if found:
            return found
        time.sleep(every)
    raise TimeoutError(f"waited {PATIENCE:.0f} s for {what}")


class Box:
    """A Slurm cluster of two nodes, and a folder that looks like a checkout to work in.

    Args:
        folder: everything lives in it; `stop` removes the cluster, not the work.
        nodes: number of nodes.
    """

    def __init__(self, folder: Path, nodes: int = 2, **site: object) -> None:
        self.cluster, self.work = folder / "slurm", folder / "work"
        self.work.mkdir(parents=True)
        start = REPOSITORY / "slurm" / "localcluster" / "start.sh"
        subprocess.run(
            [start, self.cluster, str(nodes)],
            check=True,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "FINISH": "60"},
        )
        for name in ("slurm", "experiments"):
            (self.work / name).symlink_to(REPOSITORY / name)
        python = shlex.join([sys.executable, "-m", "lightning_tucodec.cli"])
        lines = [
            f"source {self.cluster}/site.sh",
            f'SITE_TUCODEC="{python}"',
            "SITE_SIGNAL_SECONDS=120",
        ]
        lines += [f"{name}={value}" for name, value in site.items()]
        site_file = folder / "site.sh"
        site_file.write_text("\n".join(lines) + "\n")
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith("SLURM_")},
            "SLURM_CONF": str(self.cluster / "slurm.conf"),
            "TUCODEC_SITE": str(site_file),
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
        }

    def stop(self) -> None:
        """End every process of the cluster."""
        stop = REPOSITORY / "slurm" / "localcluster" / "stop.sh"
        subprocess.run([stop, self.cluster], check=True)

    @property
    def tracker(self) -> str:
        """How Slurm finds a job's processes: cgroup or linuxproc."""
        text = (self.cluster / "slurm.conf").read_text()
        return text.partition("proctrack/")[2].split()[0]

    def call(self, *words: object) -> str:
        """Run a command in the work folder and return what it prints.

        Raises:
            RuntimeError: it failed.
        """
        done = subprocess.run(
            [str(word) for word in words],
            cwd=self.work,
            env=self.env,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )
        if done.returncode:
            raise RuntimeError(f"{words}: status {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    def state(self) -> str:
        """Nodes, queue, processes and last words of the daemons, for whoever looks why something hangs."""
        processes = [f"{pid} {_name(pid)} {_status(pid)}" for pid in self.processes()]
        logs = [
            line
            for path in sorted((self.cluster / "log").iterdir())
            for line in [path.name, *path.read_text(errors="replace").splitlines()[-15:]]
        ]
        try:
            tables = [self.call("sinfo", "--Node", "--long"), self.call("squeue", "--all")]
        except (RuntimeError, subprocess.SubprocessError) as error:
            tables = [str(error)]
        return "\n".join([*tables, *processes, *logs])

    def tucodec(self, *words: object) -> str:
        """Run a command of this package."""
        return self.call(sys.executable, "-m", "lightning_tucodec.cli", *words)

    def queue(self, plan: Plan) -> dict[str, Job]:
        """See `lightning_tucodec.sweeps.queue.queued`."""
        with environment(self.env):
            return queued(plan)

    def processes(self) -> dict[int, dict[str, str]]:
        """Environments of the processes that the cluster's jobs consist of."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                text = (entry / "environ").read_bytes().decode("utf-8", "replace")
                pairs = dict(part.split("=", 1) for part in text.split("\0") if "=" in part)
                if pairs.get("SLURM_CONF") == self.env["SLURM_CONF"] and "SLURM_JOB_ID" in pairs:
                    found[int(entry.name)] = pairs
        return found


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """`os.environ` with other values for a while, for one thread after the other."""
    with _ENVIRONMENT:
        before = dict(os.environ)
        os.environ.clear()
        os.environ.update(values)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


# --- Data and sweeps -------------------------------------------------------------------------


def make_data(folder: Path) -> dict[str, str]:
    """Shards of 12 patches of 64×64 from photographs, and a validation image; their paths."""
    from data_pipelines.options import BuildOptions
    from data_pipelines.shards import build

    for part, names in (("photos", PHOTOS), ("val", PHOTOS[2:3])):
        (folder / part).mkdir(parents=True)
        for name in names:
            side = 200 if part == "photos" else 64
            Image.fromarray(photo(name, side, side)).save(folder / part / f"{Path(name).stem}.png")
    options = BuildOptions(patch=64, count=12, shard_size=4, duplicate_bits=-1)
    build([str(folder / "photos")], str(folder / "shards"), options)
    return {"shards": str(folder / "shards"), "val_images": str(folder / "val")}


def write_recipe(path: Path, data: dict[str, str], steps: int = STEPS) -> None:
    """A configuration for `tucodec fit`: a small network, two crops of 64×64 a step, frequent saves."""
    config = {
        "seed_everything": 0,
        "run": {"name": "box", "checkpoint_minutes": 0.03, "threads": 1},
        "model": {
            "preset": "tiny", "codec": {**MICRO, "quantizer": "noise"},
            "lmbda": 200.0, "lr": 2e-3, "warmup_steps": 5,
        },
        "data": {**data, "batch_size": 2, "crop": 64},
        "trainer": {
            "accelerator": "cpu", "devices": 1, "max_steps": steps, "max_epochs": -1, "log_every_n_steps": 2,
            "num_sanity_val_steps": 0, "enable_model_summary": False, "val_check_interval": steps // 3,
            "check_val_every_n_epoch": None,
        },
    }  # fmt: skip
    path.write_text(yaml.safe_dump(config, sort_keys=False))


class Subject:
    """A sweep of one task on a box, which hits are aimed at.

    Args:
        box: where it runs.
        name: of its folder.
        config: configuration file of `tucodec fit`.
        disk: parent of the run folder; None: a folder of its own.
        sets: more words for --set.
        prepare: called with the run folder's path before the task is submitted.
        site: variables of a site file that goes on from the box's.
    """

    def __init__(
        self,
        box: Box,
        name: str,
        config: Path,
        disk: Path | None = None,
        sets: Sequence[str] = (),
        prepare: Callable[[Path], None] = lambda run: None,
        **site: object,
    ) -> None:
        self.box = box
        folder = box.work / name
        folder.mkdir()
        self.disk = disk or folder / "runs"
        sweep = folder / "sweep.yaml"
        sweep.write_text(
            yaml.safe_dump({"name": "one", "stages": {"run": {"config": str(config)}}})
        )
        words: list[object] = ["--out", folder / "sweeps"]
        for text in (f"run.runs_dir={self.disk}", *sets):
            words += ["--set", text]
        site_file = folder / "site.sh"
        lines = [f"source {shlex.quote(box.env['TUCODEC_SITE'])}"]
        site_file.write_text("\n".join([*lines, *(f"{k}={v}" for k, v in site.items())]) + "\n")
        self.plan = Plan.open(Path(box.tucodec("sweep", "plan", sweep, *words)))
        self.task = next(iter(self.plan.tasks.values()))
        prepare(self.run)
        box.call(
            "env", f"TUCODEC_SITE={site_file}",
            sys.executable, "-m", "lightning_tucodec.cli", "sweep", "submit", self.plan.folder,
        )  # fmt: skip

    @property
    def run(self) -> Path:
        """The run folder."""
        folder = self.plan.run_folder(self.task)
        assert folder is not None
        return folder

    @property
    def job(self) -> str:
        """Id of the task's newest job."""
        return str(self.events("start")[-1]["job"])

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Lines of its attempts of a kind: start, end or lost."""
        return [row for row in self.plan.attempts(self.task) if row["event"] == kind]

    def ranks(self) -> list[int]:
        """Process ids of the training processes, by rank."""
        found = {
            int(env["SLURM_PROCID"]): pid
            for pid, env in self._processes().items()
            if "SLURM_PROCID" in env and env.get("SLURM_STEP_ID") == "0" and _is_fit(pid)
        }
        return [found[rank] for rank in sorted(found)]

    def _processes(self) -> dict[int, dict[str, str]]:
        array, number = self.job.split("_")
        return {
            pid: env for pid, env in self.box.processes().items()
            if (env.get("SLURM_ARRAY_JOB_ID"), env.get("SLURM_ARRAY_TASK_ID")) == (array, number)
        }  # fmt: skip

    def everything(self) -> list[int]:
        """Process ids of all that the job consists of: Slurm's step daemons, the script, srun, the ranks."""
        processes = self._processes()
        parents = {_parent(pid) for pid in processes}
        return [*{p for p in parents if _name(p) == "slurmstepd"}, *processes]

    def freeze_at(self, step: int) -> list[int]:
        """Stop the training processes once this step is logged; returns their ids, by rank.

        While they stand still, whatever hits them has all the time it takes.

        Raises:
            RuntimeError: the task came to its end first.
        """

        def running() -> list[int] | None:
            self._refuse_complete()
            found = self.ranks() if self.events("start") else []
            return found if len(found) == 2 else None

        def reached() -> bool:
            self._refuse_complete()
            started = self.events("start")[-1]["time"]
            rows = read_json_lines(self.run / "metrics.jsonl")
            return bool(rows) and rows[-1]["opt_step"] >= step and rows[-1]["time"] > started

        ranks = wait_for("both training processes", running, 0.3)
        wait_for(f"step {step} of {self.run}", reached, 0.02)
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)
        return list(ranks)

    def _refuse_complete(self) -> None:
        if self.plan.is_complete(self.task):
            raise RuntimeError("the task was complete before it could be hit")

    def wait_end(self) -> int:
        """Wait until the running attempt has ended; its exit status, -1 if killed before it could say."""
        count = len(self.events("start"))
        ends = wait_for(
            "an attempt's end",
            lambda: len(e := [*self.events("end"), *self.events("lost")]) >= count and e,
        )
        last = max(ends, key=lambda row: row["time"])
        return int(last["status"]) if last["event"] == "end" else -1

    def keep_going(self, starts: int) -> None:
        """Wait for the start after `starts` earlier ones; submit again if the job is gone."""

        def started() -> bool:
            if len(self.events("start")) > starts or self.plan.is_complete(self.task):
                return True
            if self.task.name not in self.box.queue(self.plan):
                self.box.tucodec("sweep", "retry", self.plan.folder)
            return False

        wait_for("the task's next start", started, 0.5)

    def finish(self) -> None:
        """Wait until the task is complete; submit again if its job is gone."""

        def complete() -> bool:
            if self.plan.is_complete(self.task):
                return True
            if self.task.name not in self.box.queue(self.plan):
                self.box.tucodec("sweep", "retry", self.plan.folder)
            return False

        wait_for("the task's completion", complete, 0.5)


def _is_fit(pid: int) -> bool:
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return b"fit" in words and not words[0].endswith((b"srun", b"bash"))
    return False


def _parent(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def _status(pid: int) -> str:
    """As ps says: R, S, T, Z …; X where there is no such process."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return "X"


def _started(pid: int) -> str:
    """When a process began, in the kernel's ticks, which tells it from a later one of the same id."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


def lives(pid: int) -> bool:
    """Whether there is such a process, and it has not ended."""
    return _status(pid) not in "ZX"


def _kill(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


# --- Hits ------------------------------------------------------------------------------------


def time_limit(subject: Subject, ranks: list[int], rng: random.Random) -> None:
    """The time limit comes near: Slurm sends USR1 (it looks at limits twice a minute)."""
    job = subject.job
    elapsed = subject.box.call("squeue", "--noheader", f"--jobs={job}", "--format=%M")
    minutes = _minutes(elapsed) + 2  # the signal is due 120 seconds before
    subject.box.call("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")
    bit = 1 << (signal.SIGUSR1 - 1)

    def pending() -> bool:
        try:
            text = Path(f"/proc/{ranks[0]}/status").read_text()
        except FileNotFoundError:  # it has taken the signal and ended already
            return True
        masks = [
            line.split()[1] for line in text.splitlines() if line.startswith(("ShdPnd", "SigPnd"))
        ]
        return any(int(mask, 16) & bit for mask in masks)

    wait_for("USR1", pending)
    _kill(ranks, signal.SIGCONT)
    status = subject.wait_end()
    if status != 75:
        raise RuntimeError(f"USR1: exit status {status} instead of 75")

    def relieved() -> bool:
        with contextlib.suppress(RuntimeError):  # while it leaves the nodes, nothing can be changed
            subject.box.call("scontrol", "update", f"JobId={job}", "TimeLimit=1-00:00:00")
            return True
        return False

    wait_for("its limit to be lifted", relieved)


def _minutes(elapsed: str) -> int:
    """Of Slurm's [days-][hours:]minutes:seconds, rounded down."""
    days, _, rest = elapsed.rpartition("-")
    hours, minutes, _ = ("0:" * (2 - rest.count(":")) + rest).split(":")
    return (int(days or 0) * 24 + int(hours)) * 60 + int(minutes)


def requeue(subject: Subject, ranks: list[int], rng: random.Random) -> None:
    """`scontrol requeue`: Slurm sends TERM."""
    subject.box.call("scontrol", "requeue", subject.job)
    _kill(ranks, signal.SIGCONT)


def preemption(subject: Subject, ranks: list[int], rng: random.Random) -> None:
    """A job of higher priority takes both nodes."""
    subject.box.call(
        "sbatch", "--wait", "--partition=urgent", "--nodes=2", "--exclusive",
        "--output=/dev/null", "--wrap=true",
    )  # fmt: skip


def kill_rank(subject: Subject, ranks: list[int], rng: random.Random) -> None:
    """One training process is killed."""
    os.kill(rng.choice(ranks), signal.SIGKILL)
    _kill(ranks, signal.SIGCONT)


def kill_everything(subject: Subject, ranks: list[int], rng: random.Random) -> None:
    """All processes of the job are killed, Slurm's own step daemons too."""
    _kill(subject.everything(), signal.SIGKILL)
    # Slurm would find out when the nodes next report, which is minutes later; this makes them report.
    subject.box.call("scontrol", "reconfigure")


def kill_slurmd(subject: Subject, ranks: list[int], rng: random.Random) -> None:
    """A node's daemon dies; its node is down, the job's processes there live on; later it comes back.

    Not before they have ended: a new slurmd that is told to end a job of the old one's may take the job for
    one that runs for ever (Slurm 22.05), refuse to launch it again, and have its node drained.
    """
    node = rng.choice(("n1", "n2"))
    pid = int((subject.box.cluster / f"slurmd-{node}.pid").read_text())
    processes = {process: _started(process) for process in subject.everything()}

    def left() -> list[int]:
        return [p for p, began in processes.items() if lives(p) and _started(p) == began]

    os.kill(pid, signal.SIGKILL)
    try:
        wait_for(f"{node} to be down", lambda: _node(subject.box, node).startswith("down"), 0.5)
        _kill(ranks, signal.SIGCONT)
        wait_for("the job's processes to end", lambda: not left(), 0.5)
    finally:
        _kill(ranks, signal.SIGCONT)
        slurmd = shutil.which("slurmd", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        subject.box.call(slurmd, "-N", node)
    wait_for(f"{node} to be back", lambda: not _node(subject.box, node).startswith("down"), 0.5)


def _node(box: Box, node: str) -> str:
    return box.call("sinfo", "--noheader", f"--nodes={node}", "--partition=normal", "--format=%T")


def full_disk(subject: Subject, ranks: list[int], rng: random.Random) -> None:
    """The disk with the run folder is full while it is trained and saved; later there is room again.

    Where no small disk could be mounted, the processes are forbidden to write long files instead.
    """
    filler = subject.disk / "filler"
    if os.path.ismount(subject.disk):
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as stream:
            while True:
                stream.write(b"\0" * 4096)
    else:
        for pid in ranks:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (1024, 1024))
    _kill(ranks, signal.SIGCONT)
    status = subject.wait_end()
    filler.unlink(missing_ok=True)
    if status == 0:
        raise RuntimeError("a full disk: exit status 0")


def truncated_checkpoint(subject: Subject, ranks: list[int], rng: random.Random) -> None:
    """The newest checkpoint loses its end before the next start."""
    requeue(subject, ranks, rng)
    subject.wait_end()
    newest = subject.run / "checkpoints" / "last.ckpt"
    os.truncate(newest, rng.randrange(newest.stat().st_size))


HITS: dict[str, Callable[[Subject, list[int], random.Random], None]] = {
    hit.__name__: hit
    for hit in (
        requeue,
        kill_rank,
        preemption,
        truncated_checkpoint,
        kill_everything,
        full_disk,
        kill_slurmd,
        time_limit,
    )
}


def endure(subject: Subject, kinds: Sequence[str], rng: random.Random, steps: int = STEPS) -> None:
    """Hit the task once with each kind, at steps spread over its length, and let it end."""
    share = (steps - 20) // len(kinds)
    for number, kind in enumerate(kinds):
        step = 8 + number * share + rng.randrange(share // 2)
        ranks = subject.freeze_at(step)
        starts = len(subject.events("start"))
        begun = time.monotonic()
        try:
            HITS[kind](subject, ranks, rng)
            subject.keep_going(starts)
        except (RuntimeError, TimeoutError, subprocess.SubprocessError) as error:
            raise RuntimeError(f"{kind} from step {step}: {error}") from error
        seconds = time.monotonic() - begun
        print(
            f"{kind} from step {step}: started again after {seconds:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    subject.finish()


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A disk of 24 MB mounted at `folder`; the plain folder where that is not allowed."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield folder
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def difference(straight: Path, hit: Path) -> str:
    """What differs between two run folders: weights, optimiser, counters, metrics; empty if nothing does."""
    states = [
        torch.load(run / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)
        for run in (straight, hit)
    ]
    for part in ("state_dict", "optimizer_states", "tucodec"):
        if not _same(*(state[part] for state in states)):
            return part
    rows = [
        [{k: v for k, v in row.items() if k != "time"} for row in read_json_lines(run / "metrics.jsonl")]
        for run in (straight, hit)
    ]  # fmt: skip
    return "" if rows[0] == rows[1] else "metrics"


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_same(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(_same, first, second))
    return bool(first == second)


# --- The campaign ----------------------------------------------------------------------------


def campaign(seed: int, hits: int, results: Path, boxes: int) -> int:
    """Run cases until there were `hits` hits, one at a time on each box; returns how many broke."""
    everything = json.loads(results.read_text()) if results.exists() else {}
    counts = everything.get("cluster", {})
    if counts.get("seed") != seed or not isinstance(counts.get("cases"), list):
        counts = {"seed": seed, "cases": [], "hits": {}, "broken": []}  # hits: of cases that held
    cases = [case for case in range(-(-hits // len(HITS))) if case not in counts["cases"]]
    if not cases:
        return len(counts["broken"])
    with tempfile.TemporaryDirectory(prefix="tucodec-cluster-") as name:
        scratch = Path(name)
        recipe = scratch / "recipe.yaml"
        write_recipe(recipe, make_data(scratch / "data"))
        with _box(scratch / "straight") as box:
            counts["proctrack"] = box.tracker
            reference = Subject(box, "straight", recipe)
            reference.finish()

        def run(case: int) -> tuple[int, list[str], str]:
            rng = random.Random(f"cluster {seed} {case}")
            kinds = rng.sample(sorted(HITS), len(HITS))
            with (
                _box(scratch / f"case-{case}") as box,
                small_disk(scratch / f"disk-{case}") as disk,
            ):
                try:
                    subject = Subject(box, "hit", recipe, disk)
                    endure(subject, kinds, rng)
                    return case, kinds, difference(reference.run, subject.run)
                except (RuntimeError, TimeoutError, subprocess.SubprocessError) as error:
                    print(box.state(), file=sys.stderr, flush=True)
                    return case, kinds, str(error)

        with ThreadPoolExecutor(boxes) as threads:
            futures = [threads.submit(run, case) for case in cases]
            for future in as_completed(futures):
                case, kinds, wrong = future.result()
                counts["cases"] = sorted([*counts["cases"], case])
                if wrong:
                    counts["broken"].append({"case": case, "kinds": kinds, "what": wrong})
                else:
                    for kind in kinds:
                        counts["hits"][kind] = counts["hits"].get(kind, 0) + 1
                _save(results, counts)
                said = f"{sum(counts['hits'].values())}/{hits} hits: {', '.join(kinds)}"
                print(f"{said}: {wrong or 'the same'}", file=sys.stderr, flush=True)
    return len(counts["broken"])


@contextlib.contextmanager
def _box(folder: Path) -> Iterator[Box]:
    if _ENDING.is_set():
        raise RuntimeError("the campaign ends")
    box = Box(folder)
    try:
        yield box
    finally:
        box.stop()


def _save(results: Path, counts: dict[str, Any]) -> None:
    everything = json.loads(results.read_text()) if results.exists() else {}
    everything["cluster"] = counts
    with atomic_write(results, "w") as stream:
        stream.write(json.dumps(everything, indent=2, sort_keys=True) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hits", type=int, default=32)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--boxes", type=int, default=2, help="clusters at a time")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    why = missing_programs()
    if why:
        print(f"no cluster: {why}", file=sys.stderr)
        return 2

    def end(number: int, frame: object) -> None:
        _ENDING.set()
        sys.exit(128 + number)  # the clusters are stopped on the way out

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    broken = campaign(arguments.seed, arguments.hits, arguments.results, arguments.boxes)
    print(f"at least {arguments.hits} hits, {broken} broken cases")
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
