"""Hit anywhere and called again, a run leaves what the straight run leaves, to the last bit."""

import json
import os
import random
import signal
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hits import (
    full_disk_at_step,
    kill_at_rename,
    kill_at_step,
    note_reads,
    note_samples,
    rank_of,
    start,
    wait,
)

from lightning_tucodec.cli import main
from lightning_tucodec.training.runs import manifest
from lightning_tucodec.training.runs.checkpoints import restore_rng, rng_state
from lightning_tucodec.training.runs.folder import RunFolder, read_metrics
from lightning_tucodec.training.runs.weights import load_checkpoint
from lightning_tucodec.training.vae import VAE
from tests.support import MICRO
from tests.training.test_fit import config, runs, same, state, without_time, write

STEPS = 8
PARTS = ("state_dict", "optimizer_states", "tucodec", "run")


def settings(folder: Path, shards: Path, val: Path, **run: Any) -> list[str]:
    """A save after every step, a validation after every fourth, three batches a pass."""
    folder.mkdir()
    values = config(folder, shards, MICRO, STEPS)
    values["run"].update(checkpoint_minutes=0.0, **run)
    values["data"]["val_images"] = str(val)
    values["trainer"].update(log_every_n_steps=1, val_check_interval=4)
    return ["fit", "--config", write(folder, values)]


@pytest.fixture(scope="module")
def straight(
    tmp_path_factory: pytest.TempPathFactory, shard_folder: Path, val_folder: Path
) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VAE, "training_step", VAE.training_step)
        words = settings(folder, shard_folder, val_folder)
        note_samples(folder / "samples")()
        assert main(words) == 0
    return runs(folder)[0]


def with_draws(content: dict[str, Any]) -> dict[str, Any]:
    """Random states by what they draw: bytes that mean nothing differ between two processes."""
    before = rng_state()
    draws = []
    for ranks in content["run"]["rng"]:
        restore_rng(ranks)
        draws.append((torch.rand(3), torch.randn(3), np.random.random(3).tolist(), random.random()))  # noqa: NPY002
    restore_rng(before)
    return {**content, "run": {**content["run"], "rng": draws}}


def check(straight: Path, other: Path) -> None:
    first, second = with_draws(state(straight)), with_draws(state(other))
    for part in PARTS:
        assert same(first[part], second[part]), part
    expected = without_time(read_metrics(straight / "metrics.jsonl"))
    assert without_time(read_metrics(other / "metrics.jsonl")) == expected


def test_killed_in_steps_and_at_every_rename(
    straight: Path, tmp_path: Path, shard_folder: Path, val_folder: Path
) -> None:
    """Renames 1 to 3 are the first two saves; 6 and 7 belong to the save of the validation's step."""
    words = settings(tmp_path / "run", shard_folder, val_folder)
    for hit in (kill_at_rename(1), kill_at_rename(2), kill_at_step(2), kill_at_rename(3),
                kill_at_step(4), kill_at_rename(2), kill_at_step(7)):  # fmt: skip
        assert wait(start(words, hit)) == -9
    assert main(words) == 0
    (folder,) = runs(tmp_path / "run")
    check(straight, folder)
    attempts = json.loads((folder / "manifest.json").read_text())["attempts"]
    assert [a["exit"] for a in attempts] == ["killed"] * 7 + ["finished"]
    assert [a["status"] for a in attempts][-1] == 0
    assert attempts[-1]["step"] == STEPS
    starts = [a["from_step"] for a in attempts]
    assert starts == sorted(starts)  # nothing that was saved is ever lost


def test_full_disk_during_a_save(
    straight: Path,
    tmp_path: Path,
    shard_folder: Path,
    val_folder: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(manifest, "_DIFF_LIMIT", 0)  # a checkout with changes has a long manifest
    words = settings(tmp_path / "run", shard_folder, val_folder)
    assert wait(start(words, full_disk_at_step(4, 30_000))) == 1
    errors = [line for line in capfd.readouterr().err.splitlines() if "tucodec:" in line]
    assert len(errors) == 1
    assert "could not be saved" in errors[0]
    (folder,) = runs(tmp_path / "run")
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [
        "last.ckpt",
        "previous.ckpt",
    ]
    assert state(folder)["tucodec"]["opt_step"] == 4
    last = json.loads((folder / "manifest.json").read_text())["attempts"][-1]
    assert (last["exit"], last["status"]) == ("failed", 1)
    assert "could not be saved" in last["error"]
    assert main(words) == 0
    check(straight, folder)


def test_a_cut_checkpoint_and_a_cut_line(
    straight: Path,
    tmp_path: Path,
    shard_folder: Path,
    val_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = settings(tmp_path / "run", shard_folder, val_folder)
    assert wait(start(words, kill_at_step(6))) == -9
    (folder,) = runs(tmp_path / "run")
    newest = folder / "checkpoints" / "last.ckpt"
    newest.write_bytes(newest.read_bytes()[:5000])
    with open(folder / "metrics.jsonl", "a") as stream:
        stream.write('{"opt_step": 7, "trai')
    assert main(words) == 0
    assert "last.ckpt: damaged" in capsys.readouterr().err
    check(straight, folder)


def test_world_size_two_one_two(
    straight: Path, tmp_path: Path, shard_folder: Path, val_folder: Path
) -> None:
    """The same samples, noise and loss; only the order of sums differs. Each rank reads a checkpoint once."""
    words = settings(tmp_path / "run", shard_folder, val_folder)
    for attempt, (world, stop) in enumerate(((2, 3), (1, 6), (2, None))):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        shape = ["--trainer.devices", str(world), "--data.num_workers", str(2 * (2 - world))]

        def prepare(
            rank: int, attempt: int = attempt, world: int = world, port: int = port,
            stop: int | None = stop,
        ) -> None:  # fmt: skip
            note_samples(tmp_path / f"samples-{attempt}-{rank}")()
            note_reads(tmp_path / f"reads-{attempt}-{rank}")()
            if world > 1:
                rank_of(rank, world, port)()
            if stop is not None:
                kill_at_step(stop)()

        children = [
            start(words + shape, lambda rank=rank, prepare=prepare: prepare(rank))
            for rank in range(world)
        ]
        statuses = [wait(child) for child in children]
        assert statuses == ([0] * world if stop is None else [-9] * world)
        reads = [tmp_path / f"reads-{attempt}-{rank}" for rank in range(world)]
        read = [path.read_text().split() if path.exists() else [] for path in reads]
        assert read == [["last.ckpt"] if attempt else []] * world
    (folder,) = runs(tmp_path / "run")
    for name in ("train/loss", "train/bpp", "train/psnr"):
        values = [
            [row[name] for row in read_metrics(f / "metrics.jsonl") if name in row]
            for f in (straight, folder)
        ]
        assert len(values[0]) == len(values[1]) == STEPS
        assert values[1] == pytest.approx(values[0], rel=1e-4), name
    first, second = state(straight), state(folder)
    assert first["tucodec"] == second["tucodec"]
    position = "combined_loader"
    loaders = [c["loops"]["fit_loop"]["state_dict"][position] for c in (first, second)]
    assert loaders[0] == loaders[1]
    # Every attempt's every step had the crops of the straight run, each on one rank.
    expected = samples(straight.parents[1] / "samples")
    for attempt, (world, reached) in enumerate(((2, 3), (1, 6), (2, STEPS - 1))):
        given = [samples(tmp_path / f"samples-{attempt}-{rank}") for rank in range(world)]
        assert max(given[0]) == reached
        for step, crops in given[0].items():
            parts = [crops, *(other[step] for other in given[1:])]
            assert sum(map(len, parts)) == len(expected[step])
            assert {k: v for part in parts for k, v in part.items()} == expected[step]


def samples(path: Path) -> dict[int, dict[str, str]]:
    """By step: what `note_samples` has written."""
    return dict(json.loads(line) for line in path.read_text().splitlines())


def test_only_plain_types_and_known_names(straight: Path) -> None:
    content = torch.load(straight / "checkpoints" / "last.ckpt", weights_only=True)
    assert set(content["tucodec"]) >= {"opt_step", "images_seen", "codec", "recipe", "lmbda"}
    assert set(content["run"]) == {"run_id", "wandb_id", "rng"}
    assert content["run"]["wandb_id"] == straight.name.partition("-")[2]
    assert {"state_dict", "optimizer_states", "lr_schedulers", "loops"} <= set(content)
    assert len(content["run"]["rng"]) == 1
    assert load_checkpoint(straight / "checkpoints" / "previous.ckpt")
    assert RunFolder(straight).latest()


def test_a_child_of_a_process_of_two_threads_has_one() -> None:
    """A layer that OpenMP shared out in a fork would wait for threads that are not there, or fall."""
    x, weight = torch.ones(2, 32, 64, 64), torch.ones(32, 32, 1, 1)

    def prepare() -> None:
        signal.alarm(60)
        torch.nn.functional.conv2d(x, weight)
        os._exit(10 + torch.get_num_threads())

    torch.set_num_threads(2)
    torch.nn.functional.conv2d(x, weight)
    assert wait(start([], prepare)) == 11
