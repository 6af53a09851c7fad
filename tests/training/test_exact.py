"""Any module, stopped or killed in any phase of a step or of a validation, ends like the straight run."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hits
import pytest
import torch
from hits import start, wait

from lightning_tucodec.cli import main
from lightning_tucodec.training.gan import GANCodec
from lightning_tucodec.training.module import TrainingModule
from lightning_tucodec.training.postfilter import PostFilterModule
from lightning_tucodec.training.runs.folder import read_metrics
from lightning_tucodec.training.runs.weights import weights_sha256
from lightning_tucodec.training.runs.writer import BackgroundWriter
from lightning_tucodec.training.vae import VAE
from tests.support import MICRO
from tests.training.test_fit import config, runs, same, state, without_time, write
from tests.training.test_hits import with_draws

GAME: dict[str, Any] = {
    "gate_lower": 0.505, "gate_upper": 0.55, "discriminator_widths": [8, 8], "discriminator_lr": 3e-3,
    "recipe": "mse", "lmbda": 256.0, "ema": 0.9,
}  # fmt: skip

MODULES: dict[str, tuple[type[TrainingModule], dict[str, Any]]] = {
    "vae": (VAE, {}),
    "gan": (GANCodec, GAME),
    "postfilter": (PostFilterModule, {"network": {"channels": 8, "blocks": 1}, "warmup_steps": 2}),
    "two optimisers": (hits.Duel, {}),
    "user's own": (hits.Averaged, {}),
}


@dataclass
class Phase:
    """Before which call of which method something happens, counted from the start of an attempt."""

    owner: type | None
    method: str
    call: int = 1

    def at(self, module: type, action: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
        owner = self.owner or module
        original, calls = getattr(owner, self.method), 0

        def method(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == self.call:
                action()
            return original(*args, **kwargs)

        patch.setattr(owner, self.method, method)


BETWEEN = {
    "gan": Phase(None, "_step_discriminator"),
    "two optimisers": Phase(torch.optim.Optimizer, "zero_grad", 2),
}
"""Between the steps of two optimisers."""


def words(name: str, folder: Path, shards: Path, precoded: Path, val: Path) -> list[str]:
    """Validates every second batch; a pass has three batches."""
    folder.mkdir()
    module, options = MODULES[name]
    values = config(folder, shards, MICRO, steps=10)
    values["trainer"].update(val_check_interval=2, log_every_n_steps=3)
    if issubclass(module, VAE | GANCodec):
        options = {**values["model"], **options}
    values["model"] = {"class_path": f"{module.__module__}.{module.__name__}", "init_args": options}
    values["data"]["val_images"] = str(val)
    if name == "postfilter":
        data = {**values["data"], "shards": str(precoded), "val_images": str(precoded)}
        path = "lightning_tucodec.training.postfilter.PrecodedDataModule"
        values["data"] = {"class_path": path, "init_args": data}
    return ["fit", "--config", write(folder, values)]


@pytest.fixture(scope="module", params=MODULES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


Start = Callable[[Path], list[str]]


@pytest.fixture(scope="module")
def begin(name: str, shard_folder: Path, precoded_folder: Path, val_folder: Path) -> Start:
    def begin(folder: Path) -> list[str]:
        return words(name, folder, shard_folder, precoded_folder, val_folder)

    return begin


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, begin: Start) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "run"
    assert main(begin(folder)) == 0
    return runs(folder)[0]


def check(straight: Path, other: Path) -> None:
    first, second = with_draws(state(straight)), with_draws(state(other))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "tucodec", "run"):
        assert same(first[part], second[part]), part
    # What starts from either of them is one run.
    starts = {weights_sha256(folder / "checkpoints" / "last.ckpt") for folder in (straight, other)}
    assert len(starts) == 1
    rows = [without_time(read_metrics(f / "metrics.jsonl")) for f in (straight, other)]
    assert rows[0] == rows[1]
    kept = [{p.name: p.read_bytes() for p in f.glob("images/*")} for f in (straight, other)]
    assert kept[0] == kept[1]


def batches(folder: Path) -> int:
    loop = state(folder)["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    return int(loop["total"]["processed"])


def stop() -> None:
    signal.raise_signal(signal.SIGTERM)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_hit_in_every_phase(
    name: str, straight: Path, begin: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attempts of one run, each hit in another place; those that are killed save after every batch."""
    command, module = begin(tmp_path / "run"), MODULES[name][0]
    reached = []
    for phase, action in (
        (Phase(None, "on_train_batch_start"), stop),
        (Phase(None, "training_step"), stop),
        (Phase(None, "training_step", 2), kill),
        (BETWEEN.get(name, Phase(None, "on_before_optimizer_step")), stop),
        (Phase(None, "validation_step"), stop),
        (Phase(None, "validation_step"), kill),
        (Phase(None, "on_train_batch_end"), stop),
        (Phase(None, "validation_step", 2), stop),
        (Phase(None, "on_validation_epoch_end"), stop),
        (Phase(BackgroundWriter, "publish", 2), kill),
    ):
        with monkeypatch.context() as patch:
            phase.at(module, action, patch)
            if action is kill:
                words = [*command, "--run.checkpoint_minutes", "0"]
                assert wait(start(words)) == -9, phase
            else:
                assert main(command) == 75, phase
        (folder,) = runs(tmp_path / "run")
        reached.append(batches(folder))
        if name == "gan" and len(reached) == 1:
            assert state(folder)["tucodec"]["opt_step"] == 0  # the discriminator plays alone
    assert reached[0] == 1
    assert reached == sorted(reached)

    # In the validation after the last step; and whoever makes up for it is killed before the next save.
    at_the_end = batches(straight) % 2 == 0
    original = module.validation_step

    def validation_step(self: Any, *args: Any) -> None:
        if self.trainer.global_step >= self.trainer.max_steps:
            stop()
        original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "validation_step", validation_step)
        assert main(command) == (75 if at_the_end else 0)
    if at_the_end:
        assert "lines" in state(folder)["run"]
        attempt = json.loads((folder / "manifest.json").read_text())["attempts"][-1]
        assert attempt["exit"] == "preempted (SIGTERM)"
        with monkeypatch.context() as patch:
            Phase(BackgroundWriter, "settle").at(module, kill, patch)
            assert wait(start(command)) == -9
        assert main(command) == 0
    check(straight, folder)


def test_saving_after_every_batch_changes_nothing(
    straight: Path, begin: Start, tmp_path: Path
) -> None:
    """The last save is of the run's end too, with what the last hook of its last batch has done."""
    assert main([*begin(tmp_path / "run"), "--run.checkpoint_minutes", "0"]) == 0
    check(straight, runs(tmp_path / "run")[0])
