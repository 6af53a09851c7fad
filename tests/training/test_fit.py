"""`tucodec fit` from configuration to resumed run, in process and as a process that is stopped."""

import json
import logging
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lightning_tucodec.cli import main
from lightning_tucodec.codecs.learned.codec import TucModel
from lightning_tucodec.codecs.learned.model_file import ModelFile
from lightning_tucodec.errors import ModelFileError
from lightning_tucodec.training.runs.folder import RunFolder
from lightning_tucodec.training.runs.identity import run_id
from lightning_tucodec.training.runs.tracking import read_metrics
from lightning_tucodec.training.runs.weights import load_checkpoint, network_weights
from lightning_tucodec.training.vae import VAE
from tests.support import MUON, photo

RECIPES = sorted(
    path
    for path in (Path(__file__).parents[2] / "experiments").glob("*.yaml")
    if "PrecodedDataModule" not in path.read_text()  # that one: test_fit_postfilter.py
)


def config(
    tmp_path: Path, shards: Path, micro: dict[str, Any], steps: int = 6, **model: Any
) -> dict[str, Any]:
    return {
        "seed_everything": 0,
        "run": {"name": "test", "runs_dir": str(tmp_path / "runs"), "checkpoint_minutes": 60.0},
        "model": {"preset": "tiny", "codec": micro, "lr": 1e-3, "warmup_steps": 2, **model},
        "data": {"shards": str(shards), "batch_size": 4, "crop": 32},
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": steps,
            "max_epochs": -1,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            "enable_model_summary": False,
            "val_check_interval": 3,
            "check_val_every_n_epoch": None,
        },
    }


def write(tmp_path: Path, values: dict[str, Any]) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def runs(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "runs").iterdir())


def state(folder: Path) -> dict[str, Any]:
    found = RunFolder(folder).latest()
    assert found is not None
    return found[1]


def same(first: Any, second: Any) -> bool:
    """Equal to the last bit, through nested containers."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def without_time(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "time"} for row in rows]


def test_a_run_leaves_config_metrics_checkpoint_and_pictures(
    tmp_path: Path, shard_folder: Path, val_folder: Path, micro: dict[str, Any]
) -> None:
    values = config(tmp_path, shard_folder, micro)
    values["data"]["val_images"] = str(val_folder)
    assert main(["fit", "--config", write(tmp_path, values)]) == 0
    (folder,) = runs(tmp_path)
    assert folder.name.startswith("test-")
    resolved = yaml.safe_load((folder / "config.yaml").read_text())
    assert resolved["model"]["final_lr"] == 1e-6  # a default: the config is fully resolved
    assert run_id(resolved) == folder.name.removeprefix("test-")
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["opt_step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4, 5, 6]
    validations = [row for row in rows if "val/bpp" in row]
    assert [row["opt_step"] for row in validations] == [3, 6]
    last = validations[-1]
    assert last["images_seen"] == 24
    assert 0 < last["val/real_bpp"] < 1.2 * last["val/bpp"] + 1
    assert last["val/centres_used"] + last["val/centres_dead"] == micro["centres"]
    kept = ("-1.png", ".json", ".png")  # two images, and what was measured on each
    assert [p.name for p in sorted((folder / "images").iterdir())] == [
        f"step-0000000{step}{kind}" for step in (3, 6) for kind in kept
    ]
    images = json.loads((folder / "images" / "step-00000006.json").read_text())
    assert [row["index"] for row in images] == [0, 1]
    assert sum(row["psnr"] for row in images) / 2 == pytest.approx(last["val/psnr"])
    assert state(folder)["tucodec"]["opt_step"] == 6


@pytest.mark.parametrize("levels", [1, 3])
def test_a_resumed_run_ends_like_the_straight_one(
    tmp_path: Path,
    shard_folder: Path,
    micro: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    levels: int,
) -> None:
    """Stopped by its own flag after batch 3, called again: weights, optimiser, metrics, to the bit."""
    micro = {**micro, "levels": levels}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    straight = config(tmp_path / "a", shard_folder, micro, steps=8)
    assert main(["fit", "--config", write(tmp_path / "a", straight)]) == 0

    stopped = config(tmp_path / "b", shard_folder, micro, steps=8)
    words = ["fit", "--config", write(tmp_path / "b", stopped)]
    original = VAE.on_before_optimizer_step

    def interrupt(self: VAE, optimizer: torch.optim.Optimizer) -> None:
        original(self, optimizer)
        if self.opt_step == 3:
            signal.raise_signal(signal.SIGUSR1)

    monkeypatch.setattr(VAE, "on_before_optimizer_step", interrupt)
    assert main(words) == 75
    monkeypatch.setattr(VAE, "on_before_optimizer_step", original)
    (folder,) = runs(tmp_path / "b")
    assert state(folder)["tucodec"]["opt_step"] == 4
    assert main(words) == 0
    (folder,) = runs(tmp_path / "b")

    first, second = state(runs(tmp_path / "a")[0]), state(folder)
    assert same(first["state_dict"], second["state_dict"])
    assert same(first["optimizer_states"], second["optimizer_states"])
    assert first["tucodec"] == second["tucodec"]
    expected = without_time(read_metrics(runs(tmp_path / "a")[0] / "metrics.jsonl"))
    assert without_time(read_metrics(folder / "metrics.jsonl")) == expected


def test_a_terminated_process_saves_and_another_one_goes_on(
    tmp_path: Path, shard_folder: Path, micro: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    words = {}
    for name in ("straight", "stopped"):
        (tmp_path / name).mkdir()
        values = config(tmp_path / name, shard_folder, micro, steps=100)
        values["run"]["threads"] = 1
        values["trainer"]["log_every_n_steps"] = 10
        words[name] = ["fit", "--config", write(tmp_path / name, values)]
    command = [sys.executable, "-m", "lightning_tucodec.cli", *words["stopped"]]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 600
    while not list(tmp_path.glob("*/runs/*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 75, errors
    # Nothing but our own lines: no traceback, none of Lightning's tips and warnings.
    assert all(line.startswith(("run ", "step ")) for line in errors.splitlines()), errors
    (folder,) = runs(tmp_path / "stopped")
    assert 0 < state(folder)["tucodec"]["opt_step"] < 100
    assert main(words["stopped"]) == 0
    assert "goes on at step" in capsys.readouterr().err
    assert main(words["straight"]) == 0
    (straight,) = runs(tmp_path / "straight")
    for part in ("state_dict", "optimizer_states", "tucodec"):
        assert same(state(straight)[part], state(folder)[part])
    expected = without_time(read_metrics(straight / "metrics.jsonl"))
    assert without_time(read_metrics(folder / "metrics.jsonl")) == expected


def test_a_finished_run_does_nothing_more(
    tmp_path: Path,
    shard_folder: Path,
    micro: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["fit", "--config", write(tmp_path, config(tmp_path, shard_folder, micro, steps=2))]
    assert main(words) == 0
    (folder,) = runs(tmp_path)
    before = (folder / "metrics.jsonl").read_text()
    assert f"run {folder}: finished at step 2" in capsys.readouterr().err.splitlines()
    assert main(words) == 0
    assert capsys.readouterr().err.splitlines() == [
        f"run {folder}: goes on at step 2",
        f"run {folder}: finished at step 2",
    ]
    assert (runs(tmp_path)[0] / "metrics.jsonl").read_text() == before


def test_a_short_run_ends_with_what_it_measured(
    tmp_path: Path,
    shard_folder: Path,
    micro: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Fewer steps than between two logs; and what the last validation found."""
    values = config(tmp_path, shard_folder, micro, steps=2)
    values["trainer"]["log_every_n_steps"] = 50
    assert main(["fit", "--config", write(tmp_path, values)]) == 0
    *_, step, end = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"step 2/2 bpp=\d[\d.]* dB=\d[\d.]*", step)
    assert end.endswith(": finished at step 2")
    (tmp_path / "val").mkdir()
    Image.fromarray(photo("coffee.png", 40, 24)).save(tmp_path / "val" / "0.png")
    values["data"]["val_images"] = str(tmp_path / "val")
    values["trainer"]["val_check_interval"] = 2
    assert main(["fit", "--config", write(tmp_path, values)]) == 0
    *_, step, validation, _ = capsys.readouterr().err.splitlines()
    assert step.startswith("step 2/2 bpp=")
    (folder,) = (path for path in runs(tmp_path) if (path / "images").exists())
    (row,) = (row for row in read_metrics(folder / "metrics.jsonl") if "val/psnr" in row)
    assert validation.startswith("step 2 validation: ")
    assert f" psnr={row['val/psnr']:.4g} " in validation


def full(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139.80 GiB of which\n"
        "9.00 GiB is free. See documentation for Memory Management"
    )


def test_a_gpu_without_memory_is_one_line(
    tmp_path: Path,
    shard_folder: Path,
    micro: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(VAE, "training_step", full)
    values = config(tmp_path, shard_folder, micro)
    assert main(["fit", "--config", write(tmp_path, values)]) == 1
    assert capsys.readouterr().err.splitlines()[1:] == [
        "tucodec: step 0: not enough memory on the GPU (CUDA out of memory): "
        "take a smaller data.batch_size or data.crop, more GPUs, or trainer.precision bf16-mixed"
    ]
    monkeypatch.setattr("lightning_tucodec.bench.train.run", full)
    assert main(["bench", "train"]) == 1
    assert capsys.readouterr().err == (
        "tucodec: not enough memory on the GPU for this (CUDA out of memory)\n"
    )


def test_a_node_that_never_comes_is_named(
    tmp_path: Path,
    shard_folder: Path,
    micro: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)  # and what Lightning sets is gone afterwards
    values = config(tmp_path, shard_folder, micro)
    strategy = {"timeout": "0:00:01", "process_group_backend": "gloo"}
    values["trainer"]["num_nodes"] = 2
    values["trainer"]["strategy"] = {
        "class_path": "pytorch_lightning.strategies.DDPStrategy",
        "init_args": strategy,
    }
    assert main(["fit", "--config", write(tmp_path, values)]) == 1
    first, waits, error = capsys.readouterr().err.splitlines()
    assert first.endswith(": starts")
    assert waits.endswith("waits for the processes of 2 nodes, 2 in all, at most 0:00:01")
    assert error.startswith(
        "tucodec: trainer.num_nodes 2, trainer.devices 1: not all processes have come"
    )


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_a_caller_keeps_its_filters_of_warnings_and_levels_of_logs(
    command: str, tmp_path: Path, shard_folder: Path, micro: dict[str, Any]
) -> None:
    from lightning_tucodec.training import advice, configuration  # noqa: F401 - what its imports set stays

    loggers = [logging.getLogger(name) for name in advice.TALKATIVE]
    before = list(warnings.filters), [logger.level for logger in loggers]
    values = config(tmp_path, shard_folder, micro)
    status = main([command, "--config", write(tmp_path, values)])
    assert status == (0 if command == "fit" else 1)  # it names no images
    assert (list(warnings.filters), [logger.level for logger in loggers]) == before


def test_a_damaged_checkpoint_falls_back_a_generation(
    tmp_path: Path, shard_folder: Path, micro: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    values = config(tmp_path, shard_folder, micro, steps=4)
    values["run"]["checkpoint_minutes"] = 0.0
    words = ["fit", "--config", write(tmp_path, values)]
    assert main(words) == 0
    (folder,) = runs(tmp_path)
    newest = folder / "checkpoints" / "last.ckpt"
    newest.write_bytes(newest.read_bytes()[:1000])
    assert state(folder)["tucodec"]["opt_step"] == 3
    assert "last.ckpt: damaged" in capsys.readouterr().err
    assert main(words) == 0
    assert state(folder)["tucodec"]["opt_step"] == 4


def test_a_loss_that_is_not_finite_stops_with_the_state_saved(
    tmp_path: Path, shard_folder: Path, micro: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    values = config(tmp_path, shard_folder, micro, lmbda=1e39)
    assert main(["fit", "--config", write(tmp_path, values)]) == 1
    errors = capsys.readouterr().err
    assert "loss or gradient is not finite at optimiser step 0; state saved in" in errors
    assert (runs(tmp_path)[0] / "checkpoints" / "nonfinite-0.ckpt").exists()


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
@pytest.mark.parametrize(
    ("asked", "trainer", "val", "minutes"),
    [
        ("where it logs", {"log_every_n_steps": 1}, False, 60.0),
        ("before a validation", {"log_every_n_steps": 100}, True, 60.0),
        ("before a save", {"log_every_n_steps": 100}, False, 1e-9),
        ("at the end", {"log_every_n_steps": 0}, False, 60.0),
    ],
)
def test_a_gradient_that_is_not_finite_stops_before_the_step(
    tmp_path: Path, shard_folder: Path, val_folder: Path, micro: dict[str, Any],
    optimizer: str, asked: str, trainer: dict[str, Any], val: bool, minutes: float,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Whenever it is noticed, the saved weights are those of before, so that the cause can be looked for."""
    sound: list[torch.Tensor] = []

    def spoil(self: VAE, loss: torch.Tensor) -> None:
        loss.backward()
        if self.opt_step == 1:
            sound.extend(value.clone() for value in self.state_dict().values())
            for part in self.network.children():
                for weight in part.parameters():
                    assert weight.grad is not None
                    weight.grad.mul_(torch.nan)

    monkeypatch.setattr(VAE, "backward", spoil)
    wider = MUON if optimizer == "muon" else {}
    values = config(tmp_path, shard_folder, {**micro, **wider}, optimizer=optimizer)
    values["trainer"] |= trainer
    values["run"]["checkpoint_minutes"] = minutes
    if val:
        values["data"]["val_images"] = str(val_folder)
    assert main(["fit", "--config", write(tmp_path, values)]) == 1
    assert "not finite at optimiser step 1; state saved in" in capsys.readouterr().err
    (folder,) = runs(tmp_path)
    content = torch.load(folder / "checkpoints" / "nonfinite-1.ckpt", weights_only=True)
    assert all(map(torch.equal, content["state_dict"].values(), sound))
    states = content["optimizer_states"][0]["state"].values()
    assert all(torch.isfinite(value).all() for state in states for value in state.values())
    found = RunFolder(folder).latest()
    assert found is None or found[1]["tucodec"]["opt_step"] == 1
    assert all("val/bpp" not in row for row in read_metrics(folder / "metrics.jsonl"))


def test_validation_goes_on_when_the_network_cannot_be_frozen(
    tmp_path: Path,
    shard_folder: Path,
    val_folder: Path,
    micro: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*args: Any) -> None:
        raise ModelFileError("sums beyond 2^53")

    monkeypatch.setattr("lightning_tucodec.training.vae.freeze", refuse)
    values = config(tmp_path, shard_folder, micro, steps=3)
    values["data"]["val_images"] = str(val_folder)
    assert main(["fit", "--config", write(tmp_path, values)]) == 0
    assert "no real files, sums beyond" in capsys.readouterr().err
    last = read_metrics(runs(tmp_path)[0] / "metrics.jsonl")[-1]
    assert "val/bpp" in last
    assert "val/real_bpp" not in last


def test_real_files_of_the_first_images(
    tmp_path: Path, shard_folder: Path, val_folder: Path, micro: dict[str, Any]
) -> None:
    values = config(tmp_path, shard_folder, micro, steps=1, real_files=1)
    values["data"]["val_images"] = str(val_folder)
    values["trainer"]["val_check_interval"] = 1
    assert main(["fit", "--config", write(tmp_path, values)]) == 0
    (folder,) = runs(tmp_path)
    first, second = json.loads((folder / "images" / "step-00000001.json").read_text())
    line = read_metrics(folder / "metrics.jsonl")[-1]
    assert "real_bpp" not in second
    assert line["val/real_bpp"] == pytest.approx(first["real_bpp"])
    ratio = first["real_bpp"] / (first["bpp_y"] + first["bpp_z"])
    assert line["val/real_over_estimated"] == pytest.approx(ratio)
    assert line["val/psnr"] == pytest.approx((first["psnr"] + second["psnr"]) / 2)


def test_validate_and_test_measure_the_run(
    tmp_path: Path,
    shard_folder: Path,
    val_folder: Path,
    micro: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    values = config(tmp_path, shard_folder, micro, steps=3)
    values["data"]["val_images"] = str(val_folder)
    path = write(tmp_path, values)
    assert main(["validate", "--config", path]) == 1
    assert "nothing was trained" in capsys.readouterr().err
    assert main(["fit", "--config", path]) == 0
    row = read_metrics(runs(tmp_path)[0] / "metrics.jsonl")[-1]
    before = sorted(p.name for p in tmp_path.iterdir())
    read, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda path, **kw: read.append(path) or load(path, **kw))
    for command, prefix in [("validate", "val"), ("test", "test")]:
        capsys.readouterr()
        assert main([command, "--config", path, "--trainer.enable_progress_bar", "false"]) == 0
        printed = capsys.readouterr().out
        (line,) = [line for line in printed.splitlines() if f"{prefix}/psnr" in line]
        assert float(line.split("│")[2]) == pytest.approx(row["val/psnr"], rel=1e-6)
    assert len(read) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert main(["validate", "--config", path, "--ckpt_path", "none.ckpt"]) == 1
    assert "none.ckpt: No such file" in capsys.readouterr().err
    assert main(["test", "--config", path, "--data.val_images", "null"]) == 1
    assert "--data.val_images" in capsys.readouterr().err


def test_warm_start_crosses_kinds_of_quantiser_and_refuses_other_networks(
    tmp_path: Path, shard_folder: Path, micro: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    noise = {**micro, "quantizer": "noise"}
    assert main(["fit", "--config", write(tmp_path, config(tmp_path, shard_folder, noise, 2))]) == 0
    checkpoint = runs(tmp_path)[0] / "checkpoints" / "last.ckpt"
    values = config(tmp_path, shard_folder, micro, 1)
    values["run"].update(name="warm", init_from=str(checkpoint))
    assert main(["fit", "--config", write(tmp_path, values)]) == 0
    values["model"]["codec"] = {**micro, "hyper.channels": 12}
    assert main(["fit", "--config", write(tmp_path, values)]) == 1
    assert "another network" in capsys.readouterr().err


def test_frozen_parts_keep_what_init_parts_gave_them(
    tmp_path: Path, shard_folder: Path, micro: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--config", write(tmp_path, config(tmp_path, shard_folder, micro, 2))]) == 0
    checkpoint = runs(tmp_path)[0] / "checkpoints" / "last.ckpt"
    start = network_weights(load_checkpoint(checkpoint))
    values = config(tmp_path, shard_folder, {**micro, "hyper.channels": 12}, 2)
    values["run"].update(name="frozen", init_from=str(checkpoint))
    values["model"].update(frozen=["g_a", "g_s"], init_parts=["g_a", "g_s", "context"])
    for optimizer in ("adam", "muon"):
        values["model"]["optimizer"] = optimizer
        assert main(["fit", "--config", write(tmp_path, values)]) == 0
    folders = [folder for folder in runs(tmp_path) if folder.name.startswith("frozen-")]
    assert len(folders) == 2
    for folder in folders:
        end = network_weights(load_checkpoint(folder / "checkpoints" / "last.ckpt"))
        same = {name.partition(".")[0] for name in start if torch.equal(start[name], end[name])}
        assert {"g_a", "g_s"} <= same
        assert not same & {"h_s", "entropy_parameters"}
        moved = {name for name in start if name.startswith("context.")}
        assert all((start[name] - end[name]).abs().max() < 0.05 for name in moved)
    for wrong, words in (
        ({"frozen": ["g_b"]}, "'g_b' is no part of the network"),
        ({"frozen": list(dict(VAE().network.named_children()))}, "nothing is left to train"),
    ):
        assert main(["fit", "--config", write(tmp_path, {**values, "model": wrong})]) == 1
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("levels", [1, 3])
def test_the_last_stage_keeps_the_symbols_and_moves_the_rate(
    tmp_path: Path,
    shard_folder: Path,
    micro: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    levels: int,
) -> None:
    """Transforms frozen, entropy networks by Muon on hard symbols, from an exported model.

    Of a variable-rate network what ŷ is multiplied by before g_s learns too.
    """
    micro = {**micro, "levels": levels}
    values = config(tmp_path, shard_folder, {**micro, "quantizer": "companded"}, 4, klt_start=False)
    assert main(["fit", "--config", write(tmp_path, values)]) == 0
    models = [tmp_path / "before.safetensors", tmp_path / "after.safetensors"]
    assert main(["export", str(runs(tmp_path)[0]), "-o", str(models[0])]) == 0
    values["run"].update(name="last", init_from=str(models[0]))
    hard = {**micro, "quantizer": "companded", "rate_proxy": "hard"}
    values["model"].update(codec=hard, optimizer="muon", lr=1e-2)
    words = ["fit", "--config", write(tmp_path, values)]
    capsys.readouterr()
    assert main(words) == 1
    assert "rate_proxy hard teaches g_a nothing: name it in model.frozen" in capsys.readouterr().err
    values["model"]["frozen"] = ["g_a", "g_s", "quantizer"]
    assert main(["fit", "--config", write(tmp_path, values)]) == 0
    (folder,) = (folder for folder in runs(tmp_path) if folder.name.startswith("last-"))
    assert main(["export", str(folder), "-o", str(models[1])]) == 0
    before, after = (TucModel(ModelFile.load(path)) for path in models)
    image = photo("coffee.png", 96, 80)
    first, second = before.code(image), after.code(image)
    np.testing.assert_array_equal(first.latents.y, second.latents.y)
    equal = np.array_equal(before.decode(first.data), after.decode(second.data))
    assert equal == (levels == 1)
    assert before.id != after.id
    assert before.bits_of(first.latents) != after.bits_of(first.latents)


def test_a_klt_start_is_for_runs_that_do_not_start_from_weights(
    tmp_path: Path, shard_folder: Path, micro: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    wide = {
        **micro,
        "quantizer": "noise",
        "transform.widths": [0, 0, 32, 24],
        "transform.gain": 4.0,
    }
    values = config(tmp_path, shard_folder, wide, steps=1, lr=1e-5, klt_start=True)

    def first_psnr(name: str) -> float:
        values["run"]["name"] = name
        assert main(["fit", "--config", write(tmp_path, values)]) == 0
        (folder,) = (folder for folder in runs(tmp_path) if folder.name.startswith(f"{name}-"))
        return float(read_metrics(folder / "metrics.jsonl")[0]["train/psnr"])

    started = first_psnr("klt")
    values["model"]["klt_start"] = False
    assert first_psnr("random") < started - 3
    values["model"]["klt_start"] = True
    values["run"]["init_from"] = str(next((tmp_path / "runs").glob("random-*")))
    assert first_psnr("warm") < started - 3
    del values["run"]["init_from"]
    values["model"]["codec"] = {**wide, "transform.gdn": True}
    values["run"]["name"] = "wrong"
    assert main(["fit", "--config", write(tmp_path, values)]) == 1
    assert "model.klt_start: a KLT start needs" in capsys.readouterr().err


def test_bfloat16_trains_as_float32_does_and_validates_in_float32(
    tmp_path: Path,
    shard_folder: Path,
    val_folder: Path,
    micro: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same losses within the noise of a batch; the validation is that of `validate` in float32."""
    losses, last = {}, {}
    for precision in ("32-true", "bf16-mixed"):
        (tmp_path / precision).mkdir()
        values = config(
            tmp_path / precision,
            shard_folder,
            {**micro, "quantizer": "noise"},
            steps=40,
            optimizer="muon",
            muon_iterations=3,
        )
        values["trainer"].update(precision=precision, val_check_interval=40)
        values["data"]["val_images"] = str(val_folder)
        path = write(tmp_path / precision, values)
        assert main(["fit", "--config", path]) == 0
        rows = read_metrics(runs(tmp_path / precision)[0] / "metrics.jsonl")
        losses[precision] = torch.tensor([r["train/loss"] for r in rows if "train/loss" in r])
        last[precision] = rows[-1]
    single, half = losses.values()
    assert not torch.equal(single, half)
    spread = float(single[20:].std())
    assert float((single - half).abs().max()) < 0.5 * spread
    (folder,) = runs(tmp_path / "bf16-mixed")
    words = ["--config", path, "--ckpt_path", str(folder / "checkpoints" / "last.ckpt")]
    capsys.readouterr()
    assert main(["validate", *words, "--trainer.precision", "32-true"]) == 0
    printed = capsys.readouterr().out
    for name in ("val/psnr", "val/bpp", "val/real_bpp"):
        (line,) = [line for line in printed.splitlines() if f" {name} " in line]
        assert float(line.split("│")[2]) == pytest.approx(last["bf16-mixed"][name], rel=1e-6)


def test_identity_ignores_where_and_knows_what(tmp_path: Path, shard_folder: Path) -> None:
    values = config(tmp_path, shard_folder, {})
    base = run_id(values)
    values["model"]["muon_iterations"] = 5  # what runs did before there was a choice
    assert run_id(values) == base
    values["model"]["muon_iterations"] = 3
    assert run_id(values) != base
    del values["model"]["muon_iterations"]
    values["run"].update(runs_dir="/elsewhere", threads=2, wandb=True)
    values["trainer"].update(devices=4, accelerator="gpu")
    values["data"]["num_workers"] = 3
    assert run_id(values) == base
    for group, change in [("model", {"lr": 2e-3}), ("data", {"batch_size": 8}),
                          ("trainer", {"max_steps": 7}), ("run", {"name": "other"})]:  # fmt: skip
        changed = {**values, group: {**values[group], **change}}
        assert run_id(changed) != base


def test_learning_rate_is_a_function_of_the_step() -> None:
    module = VAE(preset="tiny", lr=1e-3, final_lr=1e-5, warmup_steps=10, decay_start=0.5)
    rates = [module.learning_rate(step, 100) for step in (0, 9, 10, 49, 75, 100)]
    assert rates == pytest.approx([1e-4, 1e-3, 1e-3, 1e-3, 5.05e-4, 1e-5])


def test_ms_ssim_recipe_runs_and_refuses_small_crops(
    tmp_path: Path,
    large_shard_folder: Path,
    micro: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    values = config(tmp_path, large_shard_folder, micro, steps=2, recipe="ssim", lmbda=0.3)
    values["data"].update(crop=192, batch_size=2)
    assert main(["fit", "--config", write(tmp_path, values)]) == 0
    values["data"]["crop"] = 176
    assert main(["fit", "--config", write(tmp_path, values)]) == 1
    assert "crops of at least 192" in capsys.readouterr().err


def test_ms_ssim_recipe_refuses_small_patches(
    tmp_path: Path, shard_folder: Path, micro: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    values = config(tmp_path, shard_folder, micro, steps=2, recipe="ssim", lmbda=0.3)
    values["data"]["crop"] = None  # the patches as they are, 64 pixels
    assert main(["fit", "--config", write(tmp_path, values)]) == 1
    assert "got 64" in capsys.readouterr().err


def test_an_empty_mirror_on_the_command_line_is_none(
    tmp_path: Path, shard_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As from a variable of a script that is not set: the run would be copied nowhere."""
    path = write(tmp_path, config(tmp_path, shard_folder, {}))
    assert main(["fit", "--config", path, "--mirror", ""]) == 1
    assert "mirror: is empty" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("change", "status", "text"),
    [
        ({"data": {"shards": "/nowhere"}}, 1, "/nowhere"),
        ({"model": {"preset": "huge"}}, 1, "huge"),
        ({"model": {"codec": {"centers": 3}}}, 1, "centers"),
        ({"model": {"codec": {"quantizer.kind": 3}}}, 1, "quantizer.kind"),
        ({"model": {"codec": {"quantizer": "floor"}}}, 1, "floor"),
        ({"model": {"codec": {"centres": 2}}}, 1, "at least 3 centres"),
        (
            {"model": {"codec": {"transform.widths": 3}}},
            1,
            "widths: must be a list of whole numbers, got 3",
        ),
        (
            {"model": {"codec": {"hyper": {"channels": "0.5"}}}},
            1,
            "codec.hyper.channels: must be a whole",
        ),
        ({"model": {"codec": {"hyper": 3}}}, 1, "codec.hyper: must be a mapping, got 3"),
        (
            {"model": {"codec": {"transform.gain": "nan"}}},
            1,
            "codec.transform.gain: must be a number",
        ),
        ({"trainer": {"devices": 3000}}, 1, "trainer.devices 3000: "),
        (
            {"model": {"optimizer": "sgd"}},
            2,
            "model.optimizer: Expected one of 'adam', 'muon'. Got value: sgd",
        ),
        ({"model": {"lmbda": "nan"}}, 2, "model.lmbda: Expected a float. Got value: nan"),
        ({"data": {"nosuch": 3}}, 2, "data: Option 'nosuch' is not accepted"),
        ({"model": {"recipe": "psnr"}}, 1, "psnr"),
        ({"data": {"crop": 65}}, 1, "crop 65"),
        ({"data": {"val_images": "/nowhere"}}, 1, "/nowhere"),
        ({"trainer": {"accelerator": "abacus"}}, 1, "abacus"),
        ({"trainer": {"precision": "16-mixed"}}, 1, "clipped while they are scaled"),
        ({"trainer": {"precision": 16}}, 1, "clipped while they are scaled"),
        ({"trainer": {"precision": "bf16-true"}}, 1, "weights of this model are float32"),
        ({"trainer": {"precision": 64}}, 1, "weights of this model are float32"),
        ({"trainer": {"max_steps": -1, "max_epochs": 2}}, 1, "max_steps: must be 1 or more"),
        ({"model": {"learning_rate": 3}}, 2, "learning_rate"),
        ({"trainer": {"max_steps": "many"}}, 2, "max_steps"),
        ({"trainer": {"max_epochs": 0}}, 1, "max_epochs 0: nothing would be trained"),
        ({"run": {"mirror": ""}}, 1, "mirror: is empty"),
        ({"data": {"val_images": ""}}, 1, "val_images: is empty"),
        ({"run": {"mirror": "file:///x?token=a"}}, 1, "file:// URL has no parameters"),
        ({"run": {"init_from": __file__}}, 1, "test_fit.py: neither a checkpoint of a run"),
    ],
)
def test_mistakes_get_one_clear_line(
    tmp_path: Path,
    shard_folder: Path,
    micro: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    change: dict[str, dict[str, Any]],
    status: int,
    text: str,
) -> None:
    values = config(tmp_path, shard_folder, micro)
    for group, entries in change.items():
        values[group].update(entries)
    assert main(["fit", "--config", write(tmp_path, values)]) == status
    errors = capsys.readouterr().err.splitlines()
    assert text in errors[-1]
    assert all(line.startswith("run ") for line in errors[:-1])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_build_and_run_two_steps(
    path: Path, tmp_path: Path, large_shard_folder: Path, micro: dict[str, Any]
) -> None:
    """With the network made small and everything else as it stands in the file."""
    values = yaml.safe_load(path.read_text())
    values["run"].update(runs_dir=str(tmp_path / "runs"), threads=None, wandb=False)
    values["run"].pop("init_from", None)  # weights of the whole network
    model = values["model"].get("init_args", values["model"])
    model.update(preset="tiny", codec={**micro, **model.get("codec", {})})
    if "discriminator" in model:
        model["gate_lower"] = 0.0  # or the codec waits until the discriminator has learned
    values["data"].update(shards=str(large_shard_folder), batch_size=2, num_workers=0)
    values["data"]["crop"] = min(values["data"]["crop"], 192)
    values["trainer"].update(
        max_steps=2, devices=1, accelerator="cpu", log_every_n_steps=1, enable_model_summary=False
    )
    assert main(["fit", "--config", write(tmp_path, values)]) == 0
    assert state(runs(tmp_path)[0])["tucodec"]["opt_step"] == 2


def test_checkpoint_names_are_frozen(
    tmp_path: Path, shard_folder: Path, micro: dict[str, Any]
) -> None:
    """Renaming a module makes older checkpoints useless; this list changes on purpose only."""
    assert main(["fit", "--config", write(tmp_path, config(tmp_path, shard_folder, micro, 1))]) == 0
    names = sorted(state(runs(tmp_path)[0])["state_dict"])
    golden = Path(__file__).parents[1] / "golden" / "checkpoint_keys.json"
    assert names == json.loads(golden.read_text())
