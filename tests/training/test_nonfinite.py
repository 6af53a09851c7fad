"""Numbers that are not finite, beside a validation and in it: one line, and nothing is harmed."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_tucodec.cli import main
from lightning_tucodec.codecs.learned.model_file import freeze
from lightning_tucodec.errors import ModelFileError
from lightning_tucodec.training.coding import CodingModule
from lightning_tucodec.training.data import PatchDataModule
from lightning_tucodec.training.module import ScheduledModule
from lightning_tucodec.training.runs.folder import RunFolder, read_metrics
from lightning_tucodec.training.vae import VAE
from tests.codecs import zoo
from tests.support import MICRO
from tests.training.test_fit import config, runs, state, write

MODELS: dict[str, dict[str, Any]] = {
    "vae": {"codec": MICRO},
    "network": {
        "class_path": "lightning_tucodec.training.network.NetworkModule",
        "init_args": {"network": zoo.described("MeanScaleHyperprior"), "lmbda": 0.01},
    },
    "gan": {
        "class_path": "lightning_tucodec.training.gan.GANCodec",
        "init_args": {"codec": MICRO, "recipe": "mse", "lmbda": 64.0, "discriminator_widths": [8, 8],
                      "gate_lower": 0.0, "gate_upper": 2.0, "ema": 0.5},
    },
}  # fmt: skip


def command(folder: Path, model: str, shards: Path, val: Path) -> list[str]:
    """Saves after each of four steps, logs none but the last, validates after the third."""
    values = config(folder, shards, {}, steps=4)
    values["model"] = MODELS[model]
    values["data"]["val_images"] = str(val)
    values["trainer"]["log_every_n_steps"] = 100
    values["run"]["checkpoint_minutes"] = 0.0
    return ["fit", "--config", write(folder, values)]


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text.splitlines()[-1]


def check(folder: Path, step: int) -> None:
    """What is there to go on from is sound, and of before; no validation is logged."""
    content = state(folder)
    assert content["tucodec"]["opt_step"] == step
    assert all(value.isfinite().all() for value in content["state_dict"].values())
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names <= {
        "last.ckpt",
        "previous.ckpt",
        f"nonfinite-{step}.ckpt",
        f"nonfinite-{step + 1}.ckpt",
    }
    rows = read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []
    assert not any(name.startswith("val/") for row in rows for name in row)
    assert not list((folder / "images").glob("*.json"))


@pytest.mark.parametrize("model", MODELS)
def test_a_gradient_in_the_last_step_before_a_validation(
    model: str, tmp_path: Path, shard_folder: Path, val_folder: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The step that would be saved and validated."""
    original = ScheduledModule.clip

    def spoil(self: ScheduledModule, *optimizers: torch.optim.Optimizer) -> torch.Tensor:
        if self.opt_step == 2 and optimizers[0] is self.trainer.optimizers[0]:
            for group in optimizers[0].param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.fill_(torch.nan)
        return original(self, *optimizers)

    monkeypatch.setattr(ScheduledModule, "clip", spoil)
    assert main(command(tmp_path, model, shard_folder, val_folder)) == 1
    (folder,) = runs(tmp_path)
    assert last_line(capsys) == (
        "tucodec: loss or gradient is not finite at optimiser step 2; state saved in "
        f"{folder / 'checkpoints' / 'nonfinite-2.ckpt'}"
    )
    check(folder, 2)


@contextlib.contextmanager
def spoilt(network: nn.Module, part: str) -> Iterator[None]:
    parameters = [p for n, p in network.named_parameters() if n.startswith(part)]
    assert parameters
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.fill_(torch.nan)
        yield
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)


@pytest.mark.parametrize(
    ("model", "part", "told"),
    [
        ("vae", "g_s.", "psnr, loss"),
        ("vae", "h_s.", "bpp_y, loss"),
        ("vae", "factorized_prior.", "bpp_z, loss"),
        ("gan", "context.", "bpp_y, loss"),
        ("network", "entropy_bottleneck.", ""),
    ],
)
def test_weights_that_a_validation_meets(
    model: str, part: str, told: str, tmp_path: Path, shard_folder: Path, val_folder: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Only what validation shows is broken: no training step would tell. The validation stays owed."""
    words = command(tmp_path, model, shard_folder, val_folder)
    begin, end = CodingModule.on_validation_epoch_start, CodingModule.on_validation_epoch_end
    spoiling = contextlib.ExitStack()

    def start(self: CodingModule) -> None:
        spoiling.enter_context(spoilt(self.shown, part))  # type: ignore[attr-defined]
        begin(self)

    def finish(self: CodingModule) -> None:
        spoiling.close()
        end(self)

    with monkeypatch.context() as patch:
        patch.setattr(CodingModule, "on_validation_epoch_start", start)
        patch.setattr(CodingModule, "on_validation_epoch_end", finish)
        for _ in range(2):
            assert main(words) == 1
            (folder,) = runs(tmp_path)
            line = last_line(capsys)
            assert line.startswith("tucodec: " + (told or "bpp_"))
            assert line.endswith(
                "of validation image 0 is not finite at optimiser step 3; state saved in "
                f"{folder / 'checkpoints' / 'nonfinite-3.ckpt'}"
            )
            check(folder, 2)
    assert main(words) == 0
    (row,) = [row for row in read_metrics(folder / "metrics.jsonl") if "val/bpp" in row]
    assert row["opt_step"] == 3


def test_a_pixel_of_one_image(
    tmp_path: Path, shard_folder: Path, val_folder: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = command(tmp_path, "vae", shard_folder, val_folder)
    original = PatchDataModule.on_after_batch_transfer
    place = "validating"

    def spoil(self: PatchDataModule, batch: dict[str, Any], number: int) -> dict[str, Any]:
        batch = original(self, batch, number)
        assert self.trainer is not None
        if getattr(self.trainer, place) and int(batch["index"][-1]) % 2:
            batch["image"][..., 0, 0] = torch.nan
        return batch

    monkeypatch.setattr(PatchDataModule, "on_after_batch_transfer", spoil)
    assert main(words) == 1
    assert "not finite" in last_line(capsys)
    (folder,) = runs(tmp_path)
    check(folder, 2)
    place = "training"
    assert main(words) == 1
    assert "loss or gradient is not finite at optimiser step 2" in last_line(capsys)
    check(folder, 2)


def test_validate_and_export_of_broken_weights(
    tmp_path: Path, shard_folder: Path, val_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command(tmp_path, "vae", shard_folder, val_folder)
    assert main(words) == 0
    (folder,) = runs(tmp_path)
    path = folder / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    name = next(name for name in content["state_dict"] if name.startswith("network.h_s."))
    content["state_dict"][name].fill_(torch.nan)
    torch.save(content, path)
    capsys.readouterr()
    assert main(["validate", *words[1:]]) == 1
    shown = capsys.readouterr()
    assert "bpp_y, loss of validation image 0 is not finite" in shown.err.splitlines()[-1]
    assert "val/" not in shown.out
    assert RunFolder(folder).latest() is not None
    out = tmp_path / "broken.safetensors"
    assert main(["export", str(folder), "-o", str(out)]) == 1
    assert f"{name} holds a value that is not finite" in last_line(capsys)
    assert not out.exists()


def parts() -> list[str]:
    return sorted({name.split(".")[0] for name, _ in VAE(codec=MICRO).network.named_parameters()})


@pytest.mark.parametrize("part", [*parts(), "levels"])
def test_no_part_is_frozen_with_a_weight_that_is_not_finite(part: str) -> None:
    several: dict[str, Any] = {"quantizer": "noise", "levels": 3} if part == "levels" else {}
    network = VAE(codec={**MICRO, **several}).network
    told = f"^model x: network.{part}.*finite"
    with spoilt(network, part), pytest.raises(ModelFileError, match=told):
        freeze(network, "x", {})
