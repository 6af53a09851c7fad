"""`tucodec export`: a run's newest checkpoint to one model file with its card."""

import argparse
import platform
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml

from lightning_tucodec.codecs.model_file import ModelFile, freeze
from lightning_tucodec.codecs.models import SUFFIX
from lightning_tucodec.codecs.postfilter import FilterModel
from lightning_tucodec.errors import ConfigError
from lightning_tucodec.nn.codec import TucodecVAE, config_from_dict
from lightning_tucodec.nn.postfilter import PostFilter, PostFilterConfig
from lightning_tucodec.training.postfilter import averaged_weights
from lightning_tucodec.training.runs import RunFolder, network_weights
from lightning_tucodec.training.tracking import read_metrics


def export(run: Path, name: str, extra: dict[str, Any]) -> ModelFile:
    """Freeze a run's newest checkpoint (or a checkpoint file).

    The card says how the model came about: recipe, λ and its convention, steps, images seen, hours
    of training, the source of its photos as the shard index has it, the last validation.

    Args:
        run: a run folder, or a `.ckpt` file in its `checkpoints` folder.
        name: the model's name.
        extra: more entries of the card.

    Raises:
        ConfigError: there is no checkpoint.
    """
    if run.is_dir():
        found = RunFolder(run).latest()
        if found is None:
            raise ConfigError(f"{run}: no checkpoint to export; is it a run folder?")
        folder, content = run, found[1]
    else:
        try:
            content = torch.load(run, map_location="cpu", weights_only=True)
        except OSError as error:
            raise ConfigError(f"{run}: {error.strerror}") from None
        folder = run.parent.parent
    state = content["tucodec"]
    if "postfilter" in state:
        filter_network = PostFilter(PostFilterConfig(**state["postfilter"]))
        filter_network.load_state_dict(averaged_weights(content))
        card = {"recipe": "postfilter", **_card(folder, state), **extra}
        return FilterModel.freeze(filter_network, name, card).file
    network = TucodecVAE(config_from_dict(state["codec"]))
    network.load_state_dict(network_weights(content))
    return freeze(network.eval(), name, {**_card(folder, state), **extra})


def _card(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    """What the run itself knows of the model."""
    card: dict[str, Any] = {
        key: state[key]
        for key in ("recipe", "lmbda", "convention", "size", "opt_step", "images_seen")
        if key in state
    }
    rows = [r for r in read_metrics(folder / "metrics.jsonl") if r["opt_step"] <= state["opt_step"]]
    if rows:
        # Gaps of more than ten minutes are pauses between two sittings, not training.
        times = [row["time"] for row in rows]
        gaps = [later - earlier for earlier, later in pairwise(times)]
        card["training_hours"] = round(sum(gap for gap in gaps if gap < 600) / 3600, 2)
        card["trained_on"] = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if losses := [row["train/loss"] for row in rows if "train/loss" in row]:
        card["training_loss"] = {
            "first": round(losses[0], 4),
            "last_ten_mean": round(sum(losses[-10:]) / len(losses[-10:]), 4),
        }
    gains = [row for row in rows if "val/gain" in row]
    if gains:
        card["validation"] = {
            name.removeprefix("val/"): round(value, 4)
            for name, value in gains[-1].items()
            if name.startswith("val/")
        }
    validations = [row for row in rows if "val/bpp" in row]
    if validations:
        names = ("val/bpp", "val/psnr", "val/ms_ssim")
        card["validation"] = {n.removeprefix("val/"): round(validations[-1][n], 4) for n in names}
    return card


def run_export(arguments: argparse.Namespace) -> int:
    """Write the model file."""
    out = Path(arguments.out)
    if out.suffix != SUFFIX:
        raise ConfigError(f"{out}: a model file's name ends in {SUFFIX}")
    extra: dict[str, Any] = {}
    if arguments.card:
        try:
            extra = yaml.safe_load(Path(arguments.card).read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"{arguments.card}: {error}") from None
    model = export(Path(arguments.run_folder), arguments.name or out.stem, extra)
    model.save(out)
    print(f"{out}  {model.name}  id {model.id.hex()}  {out.stat().st_size} bytes")
    if model.card.get("opt_step") == 0:
        print("tucodec: this model has not been trained", file=sys.stderr)
    return 0
