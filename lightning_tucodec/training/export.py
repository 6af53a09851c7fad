"""`tucodec export`: a run's newest checkpoint, or an average of several, to one model file with its card."""

import argparse
import platform
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from lightning_tucodec.codecs.model_file import ModelFile, freeze
from lightning_tucodec.codecs.models import SUFFIX
from lightning_tucodec.codecs.postfilter import FilterModel
from lightning_tucodec.errors import ConfigError
from lightning_tucodec.nn.codec import TucodecVAE, config_from_dict
from lightning_tucodec.nn.postfilter import PostFilter, PostFilterConfig
from lightning_tucodec.training.runs import RunFolder, network_weights
from lightning_tucodec.training.tracking import read_metrics


def export(
    runs: Sequence[Path], name: str, extra: dict[str, Any], shares: Sequence[float] | None = None
) -> ModelFile:
    """Freeze a run's newest checkpoint (or a checkpoint file), or an average of several runs' weights.

    Averages of runs that went on from one another, or from one start, often do better than each of them:
    Wortsman et al., "Model soups", ICML 2022.

    The card says how the model came about: recipe, λ and its convention, steps, images seen, hours
    of training, the source of its photos as the shard index has it, the last validation. Of several
    runs it is that of the last, with the shares of all.

    Args:
        runs: run folders, or `.ckpt` files in their `checkpoints` folders.
        name: the model's name.
        extra: more entries of the card.
        shares: of the runs in the average, with sum 1; equal ones when None.

    Raises:
        ConfigError: there is no checkpoint; the runs' networks or the number of shares differ.
    """
    shares = [1 / len(runs)] * len(runs) if shares is None else shares
    if len(shares) != len(runs) or abs(sum(shares) - 1) > 1e-6:
        given = " ".join(map(str, shares))
        raise ConfigError(f"--average {given}: {len(runs)} numbers with sum 1 are needed")
    checkpoints = [_checkpoint(run) for run in runs]
    state = checkpoints[-1]["tucodec"]
    kind = "postfilter" if "postfilter" in state else "codec"
    weights: dict[str, Tensor] = {}
    for run, share, content in zip(runs, shares, checkpoints, strict=True):
        if content["tucodec"].get(kind) != state[kind]:
            raise ConfigError(f"{run}: its network differs from that of {runs[-1]}")
        for key, value in network_weights(content).items():
            if value.is_floating_point() and len(runs) > 1:
                value = weights.get(key, 0) + share * value
            weights[key] = value
    folder = runs[-1] if runs[-1].is_dir() else runs[-1].parent.parent
    card = _card(folder, state)
    if len(runs) > 1:
        card["average"] = {str(run): share for run, share in zip(runs, shares, strict=True)}
    if kind == "postfilter":
        filter_network = PostFilter(PostFilterConfig(**state[kind]))
        filter_network.load_state_dict(weights)
        return FilterModel.freeze(
            filter_network, name, {"recipe": "postfilter", **card, **extra}
        ).file
    network = TucodecVAE(config_from_dict(state[kind]))
    network.load_state_dict(weights)
    return freeze(network.eval(), name, {**card, **extra})


def _checkpoint(run: Path) -> dict[str, Any]:
    """The newest one of a run folder, or a file's."""
    if run.is_dir():
        found = RunFolder(run).latest()
        if found is None:
            raise ConfigError(f"{run}: no checkpoint to export; is it a run folder?")
        return found[1]
    try:
        content: dict[str, Any] = torch.load(run, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ConfigError(f"{run}: {error.strerror}") from None
    return content


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
    runs = [Path(run) for run in arguments.runs]
    model = export(runs, arguments.name or out.stem, extra, arguments.average)
    model.save(out)
    print(f"{out}  {model.name}  id {model.id.hex()}  {out.stat().st_size} bytes")
    if model.card.get("opt_step") == 0:
        print("tucodec: this model has not been trained", file=sys.stderr)
    return 0
