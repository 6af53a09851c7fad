"""Every option of a configuration is honoured or refused; none is taken and then ignored."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning.cli import LightningCLI

from lightning_tucodec.cli import main
from lightning_tucodec.training.configuration import RunConfig, resolve
from lightning_tucodec.training.options import REFUSED, check_options
from tests.support import MICRO
from tests.training.test_fit import config, write

HONOURED: dict[str, Any] = {
    "accelerator": "cpu", "strategy": "ddp", "devices": 1, "num_nodes": 1, "precision": "bf16-mixed",
    "max_epochs": -1, "max_steps": 7, "limit_train_batches": 2, "limit_val_batches": 2,
    "limit_test_batches": 2, "val_check_interval": 4, "check_val_every_n_epoch": None,
    "num_sanity_val_steps": 1, "log_every_n_steps": 3, "enable_progress_bar": True,
    "enable_model_summary": True, "gradient_clip_val": None,
    "gradient_clip_algorithm": None, "deterministic": True, "benchmark": True,
    "inference_mode": False, "use_distributed_sampler": True, "profiler": "simple",
    "detect_anomaly": True, "plugins": None, "sync_batchnorm": True,
}  # fmt: skip
"""What Lightning's trainer gets from us; other values of some are refused by what they would spoil."""

VALUES: dict[str, Any] = {
    "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
    "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 3}},
    "weights_only": False,
    "ckpt_path": "/nowhere.ckpt",
    "trainer.logger": False,
    "trainer.callbacks": [{"class_path": "pytorch_lightning.callbacks.LearningRateMonitor"}],
    "trainer.enable_checkpointing": True,
    "trainer.default_root_dir": "elsewhere",
    "trainer.enable_autolog_hparams": False,
    "trainer.model_registry": "name",
    "trainer.accumulate_grad_batches": 2,
    "trainer.limit_predict_batches": 3,
    "trainer.fast_dev_run": True,
    "trainer.barebones": True,
    "trainer.overfit_batches": 2,
    "trainer.reload_dataloaders_every_n_epochs": 1,
    "trainer.max_time": "00:01:00:00",
    "trainer.min_epochs": 2,
    "trainer.min_steps": 2,
}  # fmt: skip


def test_each_option_is_honoured_or_refused(tmp_path: Path, shard_folder: Path) -> None:
    resolved = resolve(config(tmp_path, shard_folder, MICRO))
    refused = REFUSED.keys() | {"ckpt_path"}
    assert refused == VALUES.keys()
    trainer = {f"trainer.{name}" for name in resolved["trainer"]}
    assert trainer == {f"trainer.{name}" for name in HONOURED} ^ {
        name for name in refused if name.startswith("trainer.")
    }
    groups = {"seed_everything", "run", "model", "data", "trainer", "mirror"}
    assert resolved.keys() - groups == {name for name in refused if "." not in name}
    assert resolved["run"].keys() == {field.name for field in fields(RunConfig)}


def test_what_is_honoured_reaches_the_trainer(
    tmp_path: Path, shard_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    got: dict[str, Any] = {}

    def note(self: LightningCLI, options: dict[str, Any], callbacks: Any) -> None:
        got.update(options)
        raise ValueError("far enough")

    monkeypatch.setattr(LightningCLI, "_instantiate_trainer", note)
    values = config(tmp_path, shard_folder, MICRO)
    values["trainer"] = HONOURED
    assert main(["fit", "--config", write(tmp_path, values)]) == 1
    assert {name: got[name] for name in HONOURED if name != "plugins"} == {
        name: value for name, value in HONOURED.items() if name != "plugins"
    }


@pytest.mark.parametrize(
    "option", [{"gradient_clip_val": 0.5}, {"gradient_clip_algorithm": "norm"}]
)
def test_a_model_that_clips_is_not_clipped_twice(
    option: dict[str, Any], tmp_path: Path, shard_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = config(tmp_path, shard_folder, MICRO)
    values["trainer"] |= option
    assert main(["fit", "--config", write(tmp_path, values)]) == 1
    (name,) = option
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line == f"tucodec: trainer.{name}: this model clips its gradients itself: model.clip_norm"
    )
    check_options({**values, "model": {"class_path": "own.Model", "init_args": {}}})


@pytest.mark.parametrize("name", VALUES)
def test_what_is_refused_is_one_line_before_anything_is_written(
    name: str, tmp_path: Path, shard_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = config(tmp_path, shard_folder, MICRO)
    group, _, option = name.rpartition(".")
    (values[group] if group else values)[option] = VALUES[name]
    assert main(["fit", "--config", write(tmp_path, values)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tucodec: {name}: is not for `tucodec fit`: ")
    assert not (tmp_path / "runs").exists()
    if name == "trainer.logger":
        values["data"]["val_images"] = str(tmp_path)
        assert main(["validate", "--config", write(tmp_path, values)]) == 1
        assert "trainer.logger: is not for `tucodec validate`" in capsys.readouterr().err
