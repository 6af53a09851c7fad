"""NetworkModule: every recipe of experiments/zoo at micro size, parity with CompressAI, bad inputs."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hits import kill_at_step, start, wait

from lightning_tucodec.cli import main
from lightning_tucodec.codecs.library import NetworkModel, load_any
from lightning_tucodec.io.images import read_image
from lightning_tucodec.training.runs.folder import read_metrics
from lightning_tucodec.training.runs.weights import network_weights
from tests.training.test_fit import runs, same, state, without_time

ZOO = sorted((Path(__file__).parents[2] / "experiments" / "zoo").glob("*.yaml"))
STEPS = 4


def micro(recipe: Path) -> dict[str, Any]:
    """A recipe with few channels, four steps, and a validation after every second."""
    values: dict[str, Any] = yaml.safe_load(recipe.read_text())
    arguments = values["model"]["init_args"]["network"]["init_args"]
    arguments["N"] = 8
    if "M" in arguments:
        arguments["M"] = 12
    if recipe.stem.startswith("elic"):
        arguments["groups"] = [2, 4, 6]
    values["data"].update(batch_size=2, crop=64)
    values["trainer"].update(
        accelerator="cpu", devices=1, max_steps=STEPS, val_check_interval=2, log_every_n_steps=1
    )
    return values


def command(
    folder: Path, values: dict[str, Any], shards: Path, val: Path | None = None
) -> list[str]:
    folder.mkdir()
    values["run"]["runs_dir"] = str(folder / "runs")
    values["data"]["shards"] = str(shards)
    if val is not None:
        values["data"]["val_images"] = str(val)
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return ["fit", "--config", str(folder / "config.yaml")]


@pytest.mark.parametrize("recipe", ZOO, ids=lambda path: path.stem)
def test_a_family_is_trained_killed_resumed_exported_and_coded(
    recipe: Path,
    tmp_path: Path,
    shard_folder: Path,
    val_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    straight = command(tmp_path / "straight", micro(recipe), shard_folder, val_folder)
    hit = command(tmp_path / "hit", micro(recipe), shard_folder, val_folder)
    assert main(straight) == 0
    assert wait(start([*hit, "--run.checkpoint_minutes", "0"], kill_at_step(3))) == -9
    assert main(hit) == 0
    (one,), (other,) = runs(tmp_path / "straight"), runs(tmp_path / "hit")
    first, second = state(one), state(other)
    for part in ("state_dict", "optimizer_states", "tucodec"):
        assert same(first[part], second[part]), part
    rows = without_time(read_metrics(one / "metrics.jsonl"))
    assert without_time(read_metrics(other / "metrics.jsonl")) == rows
    assert first["tucodec"]["opt_step"] == STEPS
    assert first["tucodec"]["images_seen"] == 2 * STEPS
    validations = [row for row in rows if "val/psnr" in row]
    assert [row["opt_step"] for row in validations] == [2, 4]
    assert all(0 < row["val/bpp"] < row["val/real_bpp"] for row in validations)
    assert all(
        row["val/channels_used"] + row["val/channels_dead"] in (8, 12) for row in validations
    )

    model, tuc, png = (tmp_path / name for name in ("m.safetensors", "cat.tuc", "cat.png"))
    assert main(["export", str(other), "-o", str(model)]) == 0
    image = str(val_folder / "cat.png")
    monkeypatch.setenv("TUCODEC_MODELS", str(tmp_path))
    quality = ["--quality", "2.5"] if recipe.stem.endswith("vbr") else []
    recon = ["--recon", str(tmp_path / "shown.png")]
    assert main(["compress", image, "-o", str(tuc), "--model", str(model), *recon, *quality]) == 0
    assert main(["decompress", str(tuc), "-o", str(png)]) == 0
    assert (read_image(png) == read_image(tmp_path / "shown.png")).all()
    loaded = load_any(model)
    assert isinstance(loaded, NetworkModel)
    assert loaded.card["opt_step"] == STEPS
    weights = network_weights(second)
    assert all(
        torch.equal(loaded.network.state_dict()[k], v) for k, v in weights.items() if v.numel()
    )
