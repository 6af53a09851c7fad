"""Stopped anywhere and called again, a run leaves what the straight run leaves, validations included."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_tucodec.cli import main
from lightning_tucodec.training.module import ScheduledModule
from lightning_tucodec.training.runs.tracking import read_metrics
from lightning_tucodec.training.vae import VAE
from tests.codecs import zoo
from tests.support import MICRO, MUON
from tests.training.test_fit import config, runs, same, state, without_time, write

STEPS = 8
BATCHES_A_PASS = 3


def settings(folder: Path, shards: Path, val: Path, micro: dict[str, Any]) -> list[str]:
    """Logs every third step and validates every fourth; a pass over the data has three batches."""
    folder.mkdir()
    values = config(folder, shards, micro, STEPS)
    values["data"]["val_images"] = str(val)
    values["trainer"].update(log_every_n_steps=3, val_check_interval=4)
    return ["fit", "--config", write(folder, values)]


@pytest.fixture(scope="module")
def straight(
    tmp_path_factory: pytest.TempPathFactory, shard_folder: Path, val_folder: Path
) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "run"
    assert main(settings(folder, shard_folder, val_folder, MICRO)) == 0
    return runs(folder)[0]


@pytest.mark.parametrize("stop", [1, 3, 4, 5, 6])
def test_stopped_after_any_step(
    stop: int,
    straight: Path,
    tmp_path: Path,
    shard_folder: Path,
    val_folder: Path,
    micro: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = settings(tmp_path / "run", shard_folder, val_folder, micro)
    stop_after(stop, words, monkeypatch)
    (folder,) = runs(tmp_path / "run")
    assert state(folder)["tucodec"]["opt_step"] == stop
    assert main(words) == 0
    check(straight, folder)


def stop_after(stop: int, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    original = ScheduledModule.clip

    def interrupt(self: ScheduledModule, *optimizers: torch.optim.Optimizer) -> torch.Tensor:
        if self.opt_step == stop - 1:
            signal.raise_signal(signal.SIGTERM)
        return original(self, *optimizers)

    with monkeypatch.context() as patch:
        patch.setattr(ScheduledModule, "clip", interrupt)
        assert main(words) == 75


HYPERPRIOR = {"network": zoo.described("MeanScaleHyperprior"), "lmbda": 0.01}


@pytest.mark.parametrize(
    ("model", "trainer", "backend"),
    [
        ({"codec": MICRO}, {"precision": "bf16-mixed"}, None),
        ({"codec": {**MICRO, **MUON}, "optimizer": "muon"}, {"precision": "bf16-mixed"}, None),
        (HYPERPRIOR, {"precision": "bf16-mixed"}, None),
        ({"codec": {**MICRO, "quantizer": "noise"}, "compile": True}, {}, "eager"),
        (
            {"network": zoo.described("FactorizedPrior"), "lmbda": 0.01, "compile": True},
            {},
            "eager",
        ),
    ],
    ids=["bf16 adam", "bf16 muon", "bf16 network", "compiled", "compiled network"],
)
def test_stopped_in_other_arithmetic(
    model: dict[str, Any],
    trainer: dict[str, Any],
    backend: str | None,
    tmp_path: Path,
    shard_folder: Path,
    val_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Validations included; before the second one the stop comes, in a pass over the data."""
    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **options: compile(f, backend=backend, **options)
    )
    folders = []
    for stop in (0, 5):
        folder = tmp_path / str(stop)
        words = settings(folder, shard_folder, val_folder, {})
        values = yaml.safe_load((folder / "config.yaml").read_text())
        values["trainer"].update(trainer)
        path = "lightning_tucodec.training.network.NetworkModule"
        own = {"class_path": path, "init_args": model} if "network" in model else model
        values["model"] = own
        write(folder, values)
        if stop:
            torch.compiler.reset()
            stop_after(stop, words, monkeypatch)
            torch.compiler.reset()
        assert main(words) == 0
        folders += runs(folder)
    check(*folders)


def test_the_last_stage_stopped_moves_no_transform(
    tmp_path: Path, shard_folder: Path, micro: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entropy networks by Muon on hard symbols, as in tiny_entropy.yaml."""
    states = {}
    for name, stop in (("straight", 0), ("stopped", 2)):
        (tmp_path / name).mkdir()
        hard = {**micro, "quantizer": "noise", "rate_proxy": "hard"}
        hard["hyper.entropy_widths"] = [32, 32]  # matrices for Muon
        values = config(tmp_path / name, shard_folder, hard, 4, optimizer="muon", muon_iterations=3)
        values["model"]["frozen"] = ["g_a", "g_s", "quantizer"]
        words = ["fit", "--config", write(tmp_path / name, values)]
        if stop:
            stop_after(stop, words, monkeypatch)
            (folder,) = runs(tmp_path / name)
            states["before"] = state(folder)
        assert main(words) == 0
        (folder,) = runs(tmp_path / name)
        states[name] = state(folder)
    for part in ("state_dict", "optimizer_states", "tucodec"):
        assert same(states["straight"][part], states["stopped"][part]), part
    before, after = states["before"]["state_dict"], states["stopped"]["state_dict"]
    still = {name for name in before if torch.equal(before[name], after[name])}
    parts = {part: {n for n in before if f".{part}." in f".{n}"} for part in ("g_a", "g_s", "h_s")}
    assert parts["g_a"]
    assert parts["g_s"]
    assert parts["g_a"] | parts["g_s"] <= still
    assert parts["h_s"]
    assert not parts["h_s"] & still


def check(straight: Path, folder: Path) -> None:
    first, second = state(straight), state(folder)
    for part in ("state_dict", "optimizer_states", "tucodec"):
        assert same(first[part], second[part]), part
    expected = without_time(read_metrics(straight / "metrics.jsonl"))
    assert without_time(read_metrics(folder / "metrics.jsonl")) == expected
    pictures = [sorted(p.name for p in (f / "images").iterdir()) for f in (straight, folder)]
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize("images", ["kept", "gone"])
def test_stopped_in_the_validation_of_the_last_pass(
    images: str,
    tmp_path: Path,
    shard_folder: Path,
    val_folder: Path,
    micro: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run ends by `max_epochs`: this validation is owed as well, and no step more."""
    passes = ["--trainer.max_steps", "20", "--trainer.max_epochs", "4"]
    straight = [*settings(tmp_path / "straight", shard_folder, val_folder, micro), *passes]
    assert main(straight) == 0
    words = [*settings(tmp_path / "run", shard_folder, val_folder, micro), *passes]
    original = VAE.validation_step

    def interrupt(self: VAE, *args: Any) -> None:
        if self.opt_step == 4 * BATCHES_A_PASS:
            signal.raise_signal(signal.SIGTERM)
        original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(VAE, "validation_step", interrupt)
        assert main(words) == 75
    (folder,) = runs(tmp_path / "run")
    if images == "gone":
        words += ["--data.val_images", "null"]
    for _ in range(2):
        assert main(words) == 0
        assert state(folder)["tucodec"]["opt_step"] == 4 * BATCHES_A_PASS
        assert state(folder)["epoch"] == state(runs(tmp_path / "straight")[0])["epoch"]
    if images == "kept":
        check(runs(tmp_path / "straight")[0], folder)
