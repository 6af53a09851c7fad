"""The KLT start: an orthogonal projection close to the best one, and its place in a run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from lightning_tucodec.cli import main
from lightning_tucodec.nn.blocks import PixelUnshuffle
from lightning_tucodec.nn.codec import TucodecVAE
from lightning_tucodec.nn.klt import REACH, start_as_klt
from lightning_tucodec.training.tracking import read_metrics
from lightning_tucodec.training.vae import resolve_codec
from tests.support import MICRO, PHOTOS, photo


def crops() -> Tensor:
    pixels = [photo(name, 128, 128) for name in PHOTOS]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255


def network(latent: int, **changes: Any) -> TucodecVAE:
    torch.manual_seed(0)
    widths = [0, 0, 64, 48]
    values = {**MICRO, "transform.widths": widths, "transform.latent_channels": latent, **changes}
    return TucodecVAE(resolve_codec("tiny", values))


@pytest.mark.parametrize("latent", [48, 32, 24])
def test_it_projects_nearly_as_well_as_one_klt_of_whole_blocks(latent: int) -> None:
    made, x = network(latent, **{"transform.gain": 3.0}), crops()
    before = (made.g_s(made.g_a(x)) - x).square().mean()
    start_as_klt(made, x)
    shown = made.g_s(made.g_a(x))
    assert torch.allclose(made.g_s(made.g_a(shown)), shown, atol=1e-4)
    blocks = PixelUnshuffle(16)(x - 0.5).transpose(0, 1).flatten(1)
    best = torch.linalg.eigvalsh((blocks @ blocks.T).double())[:-latent].sum() / x.numel()
    error = (shown - x).square().mean()
    assert best <= error * (1 + 1e-6)
    assert error < 1.3 * best < before


def test_the_centres_reach_over_every_channel() -> None:
    made, x = network(48, **{"transform.gain": 50.0}), crops()
    start_as_klt(made, x)
    y = made.g_a(x)
    reach = made.quantizer.centres().abs().max()
    assert (y.std((0, 2, 3)) <= reach / REACH * 1.001).all()
    free = network(48, **{"transform.gain": 50.0, "centres": 500})
    start_as_klt(free, x)
    assert torch.allclose(made.g_s(y), free.g_s(free.g_a(x)), atol=1e-4)


def test_other_networks_are_refused() -> None:
    for wrong in ({"transform.gdn": True}, {"transform.block": "residual"}):
        with pytest.raises(ValueError, match="KLT start needs"):
            start_as_klt(network(48, **wrong), crops())


def test_a_run_starts_from_it_unless_it_starts_from_weights(
    tmp_path: Path, shard_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    micro = {
        **MICRO,
        "quantizer": "noise",
        "transform.widths": [0, 0, 32, 24],
        "transform.gain": 4.0,
    }
    values: dict[str, Any] = {
        "seed_everything": 0,
        "run": {"name": "klt", "runs_dir": str(tmp_path / "runs")},
        "model": {"codec": micro, "klt_start": True, "lr": 1e-5, "warmup_steps": 1},
        "data": {"shards": str(shard_folder), "batch_size": 4, "crop": 32},
        "trainer": {
            "accelerator": "cpu", "devices": 1, "max_steps": 1, "max_epochs": -1,
            "log_every_n_steps": 1, "num_sanity_val_steps": 0, "enable_model_summary": False,
        },
    }  # fmt: skip

    def first_psnr(name: str) -> float:
        values["run"]["name"] = name
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        assert main(["fit", "--config", str(path)]) == 0
        (folder,) = (tmp_path / "runs").glob(f"{name}-*")
        return float(read_metrics(folder / "metrics.jsonl")[0]["train/psnr"])

    started = first_psnr("klt")
    values["model"]["klt_start"] = False
    assert first_psnr("random") < started - 3
    values["model"]["klt_start"] = True
    values["run"]["init_from"] = str(next((tmp_path / "runs").glob("random-*")))
    assert first_psnr("warm") < started - 3
    del values["run"]["init_from"]
    values["model"]["codec"] = {**micro, "transform.gdn": True}
    values["run"]["name"] = "wrong"
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(values))
    assert main(["fit", "--config", str(tmp_path / "wrong.yaml")]) == 1
    assert "model.klt_start: a KLT start needs" in capsys.readouterr().err
