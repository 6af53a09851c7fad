"""`tucodec export`: a run's newest checkpoint, or an average of several, to one model file with its card."""

import argparse
import platform
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_tucodec.codecs.base import MODEL_SUFFIX
from lightning_tucodec.codecs.h266.postfilter import FilterModel
from lightning_tucodec.codecs.learned.model_file import ModelFile, freeze
from lightning_tucodec.codecs.library import load_any
from lightning_tucodec.codecs.network.build import build, check_trusted
from lightning_tucodec.codecs.network.codec import NetworkModel, freeze_network
from lightning_tucodec.errors import ConfigError
from lightning_tucodec.io.files import check_targets, parse_yaml, read_yaml
from lightning_tucodec.nn.codec import TucodecVAE, config_from_dict
from lightning_tucodec.nn.postfilter import PostFilter, PostFilterConfig
from lightning_tucodec.training.runs.folder import RunFolder
from lightning_tucodec.training.runs.tracking import read_metrics
from lightning_tucodec.training.runs.weights import (
    initial_weights,
    load_checkpoint,
    load_trained,
    network_weights,
)


def export(
    runs: Sequence[Path], name: str, extra: dict[str, Any], shares: Sequence[float] | None = None
) -> ModelFile:
    """Freeze a run's newest checkpoint (or a checkpoint file), or an average of several runs' weights.

    Averages of runs with a common start, or that continue one another, are often better than each run:
    Wortsman et al., "Model soups", ICML 2022.

    The card describes the model's training: recipe, λ and its convention, steps, images seen, hours
    of training, the source of its photos as the shard index has it, the last validation. Of several
    runs it is that of the last, with the shares of all.

    Args:
        runs: run folders, `.ckpt` files in their `checkpoints` folders, or exported models.
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
    trained = [_trained(run) for run in runs]
    network, config, card = trained[-1]
    for run, other in zip(runs, trained, strict=True):
        if other.config != config:
            raise ConfigError(f"{run}: its network differs from that of {runs[-1]}")
    if len(runs) > 1 and isinstance(config, dict):  # tables belong to weights: they are made anew
        trained = [
            one._replace(network=_built(run, config, one.network.state_dict()))
            for run, one in zip(runs, trained, strict=True)
        ]
        network = trained[-1].network
    if len(runs) > 1:
        states = [other.network.state_dict() for other in trained]
        network.load_state_dict(_average(states, shares))
        card["average"] = [[run.name, share] for run, share in zip(runs, shares, strict=True)]
    card |= extra
    if isinstance(network, PostFilter):
        return FilterModel.freeze(network, name, card).file
    if isinstance(network, TucodecVAE):
        return freeze(network, name, card)
    return freeze_network(network, config, name, card)


class _Trained(NamedTuple):
    """A network, what tells it apart from networks of other shapes, and its card."""

    network: nn.Module
    config: Any
    card: dict[str, Any]


def _average(states: Sequence[dict[str, Tensor]], shares: Sequence[float]) -> dict[str, Tensor]:
    average = dict(states[-1])
    for key, value in average.items():
        if value.is_floating_point():
            parts = zip(states, shares, strict=True)
            average[key] = torch.stack([share * state[key] for state, share in parts]).sum(0)
    return average


def _trained(run: Path) -> _Trained:
    """The network of a run's newest checkpoint, of a checkpoint or of an exported model, and its card."""
    run = initial_weights(str(run)) if not run.is_dir() else run
    if run.suffix == MODEL_SUFFIX:
        model = load_any(run)
        if isinstance(model, NetworkModel):
            return _Trained(model.network, _described(model.file.config), dict(model.card))
        is_filter = isinstance(model, FilterModel)
        fresh = FilterModel(model.file).network if is_filter else model.file.network()
        return _Trained(fresh, fresh.config, dict(model.card))
    if run.is_dir():
        found = RunFolder(run).latest()
        if found is None:
            raise ConfigError(f"{run}: no checkpoint to export; is it a run folder?")
        folder, content = run, found[1]
    else:
        folder, content = run.parent.parent, load_checkpoint(run)
    state, weights = content["tucodec"], network_weights(content)
    card = _card(folder, state)
    if "network" in state:
        network = _built(run, state["network"], weights)
        return _Trained(network, _described(state["network"]), card)
    own: TucodecVAE | PostFilter
    if "postfilter" in state:
        own = PostFilter(PostFilterConfig(**state["postfilter"]))
        card = {"recipe": "postfilter", **card}
    else:
        own = TucodecVAE(config_from_dict(state["codec"]))
    load_trained(own, weights, run)
    return _Trained(own.eval(), own.config, card)


def _described(config: dict[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in ("class_path", "init_args")}


def _built(run: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> nn.Module:
    """A network of CompressAI's form with the weights of a run or a model, and no tables.

    Raises:
        ConfigError: its class is not allowed here, or cannot be built.
    """
    try:
        network = build(_described(config), check_trusted)
    except ConfigError as error:
        raise ConfigError(f"{run}: {error}") from None
    load_trained(network, weights, run)
    return network.eval()


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
    """`tucodec export`."""
    runs = [Path(run) for run in arguments.runs]

    def make(name: str, extra: dict[str, Any]) -> ModelFile:
        return export(runs, name, extra, arguments.average)

    model = write_model(arguments, arguments.out, arguments.runs, make)
    if model.card.get("opt_step") == 0:
        print("tucodec: this model has not been trained", file=sys.stderr)
    return 0


def run_import(arguments: argparse.Namespace) -> int:
    """`tucodec import`."""
    from lightning_tucodec.codecs.network.zoo import import_checkpoint

    source = f"{arguments.network}, from a checkpoint of CompressAI's form"
    given = None if arguments.args is None else parse_yaml(arguments.args, "--args")
    if arguments.args is not None and not isinstance(given, dict):
        raise ConfigError("--args: must be a mapping, as in --args '{N: 192, M: 320}'")
    plain = arguments.network.rpartition(".")[2]
    stem = plain if arguments.quality is None else f"{plain}-{arguments.quality}"

    def make(name: str, extra: dict[str, Any]) -> ModelFile:
        card = {"source": source, **extra}
        path = Path(arguments.checkpoint)
        return import_checkpoint(path, arguments.network, arguments.quality, given, name, card)

    write_model(arguments, arguments.out or f"{stem}{MODEL_SUFFIX}", [arguments.checkpoint], make)
    return 0


def write_model(
    arguments: argparse.Namespace,
    target: str,
    inputs: Sequence[str],
    make: Callable[[str, dict[str, Any]], ModelFile],
) -> ModelFile:
    """Make a model and write its file, once it is clear that it can be written.

    Args:
        arguments: of the command, with name, card and force.
        target: path of the file.
        inputs: files that it must not replace.
        make: the model of a name and of further entries of its card.
    """
    out = Path(target)
    if out.suffix != MODEL_SUFFIX:
        raise ConfigError(f"{out}: a model file's name ends in {MODEL_SUFFIX}")
    name = arguments.name or out.stem
    if any("\ud800" <= letter <= "\udfff" for letter in f"{out}{name}"):
        raise ConfigError(f"{out}: the name of a model and the path of its file must be UTF-8")
    card = [arguments.card] if arguments.card else []
    check_targets([out], [*inputs, *card], arguments.force)
    model = make(name, read_yaml(arguments.card) if arguments.card else {})
    model.save(out)
    print(f"{out}  {model.name}  id {model.id.hex()}  {out.stat().st_size} bytes")
    return model
