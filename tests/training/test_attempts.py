"""Starts and ends of a run's processes: exit statuses, starts without progress, overtaken attempts."""

import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

from lightning_tucodec.errors import ConfigError
from lightning_tucodec.training.fit import slurm_environment
from lightning_tucodec.training.runs import launcher, preemption
from lightning_tucodec.training.runs.folder import RunFolder
from lightning_tucodec.training.runs.launcher import attempt_key
from lightning_tucodec.training.runs.manifest import PREEMPTED, Manifest
from lightning_tucodec.training.runs.preemption import Preemption, in_step
from lightning_tucodec.training.runs.writer import BackgroundWriter, SaveError

OURS, FOREIGN = ConfigError("no such file"), RuntimeError("Connection closed by peer")


@pytest.mark.parametrize(
    ("outcome", "told", "expected"),
    [
        (0, False, 0),
        (PREEMPTED, True, PREEMPTED),
        (2, False, 202),
        (OURS, False, 201),
        (OURS, True, 201),
        (FOREIGN, True, PREEMPTED),
        (FOREIGN, False, 201),
    ],
)
def test_the_status_of_one_process_of_several(
    monkeypatch: pytest.MonkeyPatch, outcome: int | Exception, told: bool, expected: int
) -> None:
    """What failed by itself lies above what srun ends then (143, 137); those above what saved itself."""
    monkeypatch.setattr(preemption, "_PEER_SECONDS", 0.0)
    owner = Preemption()
    owner.received = signal.SIGTERM if told else None

    def run() -> int:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    with Preemption():  # gives back the signals that `in_step` keeps
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
        assert in_step(run, owner) == expected
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    if isinstance(outcome, Exception):
        with pytest.raises(type(outcome)):
            in_step(run, owner)
    else:
        assert in_step(run, owner) == outcome


def test_a_process_whose_peer_was_killed_is_ended_by_srun() -> None:
    """It waits for TERM, so does not say that it failed, and TERM does not kill it."""
    script = (
        "from lightning_tucodec.training.runs.preemption import Preemption, in_step\n"
        "import sys\n"
        "def run():\n"
        "    raise RuntimeError('gone')\n"
        "sys.exit(in_step(run, Preemption()))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, "SLURM_STEP_NUM_TASKS": "2"},
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("RuntimeError"):
            break
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == PREEMPTED


CONFIG: dict[str, Any] = {
    "run": {"name": "a", "runs_dir": "runs", "init_from": None},
    "model": {"class_path": "M", "init_args": {}}, "data": {"class_path": "D", "init_args": {}},
    "trainer": {}, "seed_everything": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("starts", "refused"),
    [
        ([("7", 0, 0), ("7", 1, 0), ("7", 2, 0)], True),
        ([("7", 0, 0), ("7", 1, 9), ("7", 2, 9), ("7", 3, 9)], True),
        ([("7", 0, 0), ("7", 1, 0), ("7", 2, 9)], False),  # further than before
        ([("7", 0, 0), ("7", 1, 0), ("8", 0, 0)], False),  # submitted again
        ([("7", 0, 0)] * 4, False),  # by hand, inside one allocation
        ([(None, 0, 0)] * 4, False),
    ],
)
def test_a_job_that_is_killed_twice_without_progress_stays_down(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    starts: list[tuple[str | None, int, int]],
    refused: bool,
) -> None:
    """Starts are (job, its restarts, images seen by the state it starts from); all are killed."""
    manifest = Manifest(RunFolder(tmp_path))
    for number, (job, restart, images) in enumerate(starts, 1):
        start = (CONFIG, images // 20, 1, images)  # within one step of a GAN's codec
        if job is not None:
            monkeypatch.setenv("SLURM_JOB_ID", job)
            monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        if refused and number == len(starts):
            with pytest.raises(ConfigError, match=r"2 starts of this job .* out of memory"):
                manifest.begin(*start)
        else:
            manifest.begin(*start)
    assert len(manifest.read()["attempts"]) == len(starts) - refused


def test_a_job_that_is_always_stopped_before_its_validation_ends_stays_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = Manifest(RunFolder(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for restart in range(10):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        manifest.begin(CONFIG, 5, 1, 100)
        manifest.end(5, "preempted (SIGUSR1)", 75, None)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "10")
    with pytest.raises(ConfigError, match=r"10 starts .* told to stop at step 5 .*SITE_TIME"):
        manifest.begin(CONFIG, 5, 1, 100)
    manifest.begin(CONFIG, 6, 1, 120)


def test_an_attempt_that_was_overtaken_saves_nothing(tmp_path: Path) -> None:
    """However late the word of the other start comes: what is there is not replaced."""
    folder = RunFolder(tmp_path)
    manifest = Manifest(folder)
    manifest.begin(CONFIG, 0, 1)
    writer = BackgroundWriter(folder)
    last = folder.checkpoints / "last.ckpt"
    writer.save_checkpoint({"tucodec": {"opt_step": 1}, "state_dict": {}}, last)
    writer.settle()
    saved = last.read_bytes()
    content = manifest.read()
    content["attempts"].append({**content["attempts"][0], "host": "elsewhere"})
    manifest._write(content)
    writer.save_checkpoint({"tucodec": {"opt_step": 2}, "state_dict": {}}, last)
    with pytest.raises(SaveError, match="goes on in another job"):
        writer.settle()
    writer.teardown()
    assert last.read_bytes() == saved
    assert [path.name for path in folder.checkpoints.iterdir()] == ["last.ckpt"]


def test_every_start_by_torchrun_has_a_key_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --rdzv-id torchrun calls each of them `none`, restart 0."""
    for name in ("TUCODEC_ATTEMPT", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    found = []
    for _ in range(2):
        store = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=60))
        monkeypatch.setenv("MASTER_PORT", str(store.port))
        for rank in ("0", "1"):
            monkeypatch.setenv("RANK", rank)
            launcher._torchrun_key.forget()
            found.append(attempt_key())
    launcher._torchrun_key.forget()
    assert found[0] == found[1]
    assert found[2] == found[3]
    assert found[0] != found[2]


@pytest.mark.filterwarnings("ignore:The `srun` command is available")
@pytest.mark.parametrize(
    ("slurm", "expected"),
    [
        ({}, []),
        ({"NTASKS": "4"}, ["LightningEnvironment"]),  # a shell of salloc
        ({"NTASKS": "4", "PROCID": "0"}, ["LightningEnvironment"]),  # a batch script without srun
        ({"NTASKS": "1", "STEP_NUM_TASKS": "1"}, ["SLURMEnvironment"]),
        (
            {"NTASKS": "4", "STEP_NUM_TASKS": "4", "NTASKS_PER_NODE": "2"},
            ["SLURMEnvironment"],
        ),
        ({"NTASKS": "4", "STEP_NUM_TASKS": "4"}, "--ntasks-per-node"),
    ],
)
def test_only_what_srun_started_has_a_rank_of_slurm(
    monkeypatch: pytest.MonkeyPatch, slurm: dict[str, str], expected: list[str] | str
) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert (attempt_key() is None) == ("STEP_NUM_TASKS" not in slurm)
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            slurm_environment()
    else:
        assert [type(found).__name__ for found in slurm_environment()] == expected
