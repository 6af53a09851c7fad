"""TucodecVAE as a LightningModule: the MSE and the MS-SSIM recipe."""

import dataclasses
import math
import platform
import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from lightning_tucodec.codecs.base import MODEL_SUFFIX
from lightning_tucodec.codecs.learned.codec import TucModel
from lightning_tucodec.codecs.learned.model_file import ModelFile, freeze
from lightning_tucodec.errors import ConfigError
from lightning_tucodec.nn.codec import (
    PRESETS,
    CodecConfig,
    CodecOutput,
    TucodecVAE,
    config_from_dict,
    config_to_dict,
)
from lightning_tucodec.nn.klt import start_as_klt
from lightning_tucodec.nn.losses import RateDistortion
from lightning_tucodec.nn.noise import LEVEL, Noise
from lightning_tucodec.training.coding import BeginFile, CodingModule
from lightning_tucodec.training.data import PatchDataModule
from lightning_tucodec.training.optimizers import FusedAdam, muon_adam
from lightning_tucodec.training.runs.weights import (
    initial_weights,
    load_checkpoint,
    network_weights,
)

KLT_CROPS = 256
"""Training crops that `klt_start` looks at."""


def resolve_codec(preset: str, overrides: dict[str, Any] | None = None) -> CodecConfig:
    """A preset with some fields replaced.

    Args:
        preset: "paper", "fast" or "tiny".
        overrides: field name to value; a dot, or a mapping, reaches into a part, as in
            {"context.channels": 0}. A text, as the command line gives it, is read as YAML where the field
            is none.

    Raises:
        ConfigError: unknown preset or field, or a value of another type than the field's.
    """
    if preset not in PRESETS:
        raise ConfigError(f"preset {preset!r} is unknown; choose one of {sorted(PRESETS)}")
    values: dict[str, Any] = dataclasses.asdict(PRESETS[preset])
    for name, value in _leaves(overrides or {}):
        *path, last = name.split(".")
        target: Any = values
        for part in path:
            target = target.get(part) if isinstance(target, dict) else None
        if not isinstance(target, dict) or last not in target:
            raise ConfigError(f"codec has no field {name!r}")
        target[last] = _fitting(name, value, target[last])
    try:
        return config_from_dict(values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"codec: {error}") from None


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _fitting(name: str, value: Any, present: Any) -> Any:
    """A value for a field that holds `present`.

    Raises:
        ConfigError: it is of another type.
    """
    if isinstance(value, str) and not isinstance(present, str):
        value = yaml.safe_load(value)
    what, fits = "a whole number", type(value) is int
    if present is None:
        fits = value is None or type(value) is int
    elif isinstance(present, bool):
        what, fits = "true or false", isinstance(value, bool)
    elif isinstance(present, float):
        what, fits = "a number", type(value) in (int, float) and math.isfinite(value)
    elif isinstance(present, str):
        what, fits = "a word", isinstance(value, str)
    elif isinstance(present, list | tuple):
        what = "a list of whole numbers"
        fits = isinstance(value, list | tuple) and all(type(one) is int for one in value)
    elif isinstance(present, dict):
        what, fits = "a mapping", False
    if not fits:
        raise ConfigError(f"codec.{name}: must be {what}, got {value!r}")
    return value


class CodecModule(CodingModule):
    """What all trainings of a TucodecVAE share: noise, validation, checkpoint entries.

    The quantisers' noise of a sample is a function of the seed and of its position, so that a resumed run
    and any number of ranks draw the same. Learning rate and clipping: `ScheduledModule`.

    Args:
        recipe: "mse" (λ·MSE + bpp) or "ssim" (0.2·MSE + 0.8·(1 − MS-SSIM) + λ·bpp).
        lmbda: λ in that recipe's convention.
        preset: size of the network.
        codec: replaced fields of the preset, see `resolve_codec`.
        lr: learning rate on the plateau.
        optimizer: "adam", or "muon" for all convolutions but small ones, see MuonAdam. Under the trainer's
            precision "bf16-mixed" its iterations compute in bfloat16 too.
        muon_iterations: Newton–Schulz iterations in a step of Muon.
        final_lr: learning rate at the end.
        warmup_steps: length of the warm-up.
        decay_start: fraction of `max_steps` at which the cosine begins.
        clip_norm: gradients are scaled down to this norm.
        seed: of the quantisers' noise.
        frozen: parts that keep their initial weights, as in ["g_a", "g_s"].
        init_parts: parts that `run.init_from` gives weights to; None: all.
        real_files: number of validation images, from the first, that are coded to real files; None: all.
            The transforms run on the training's device, the entropy coder on the CPU.
        klt_start: start without `run.init_from` from `start_as_klt` of the first training crops.
        compile: train by one compiled graph of network and loss. It rounds otherwise, so that such a run has
            another name. The first step takes minutes. Validation is not compiled: each size of images would
            be anew.
    """

    def __init__(
        self,
        recipe: str = "mse",
        lmbda: float = 512.0,
        preset: str = "tiny",
        codec: dict[str, Any] | None = None,
        lr: float = 1e-4,
        optimizer: Literal["adam", "muon"] = "adam",
        final_lr: float = 1e-6,
        warmup_steps: int = 100,
        decay_start: float = 0.5,
        clip_norm: float = 1.0,
        seed: int = 0,
        frozen: list[str] | None = None,
        init_parts: list[str] | None = None,
        klt_start: bool = False,
        muon_iterations: int = 5,
        real_files: int | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__(
            *(recipe, lmbda, lr, final_lr, warmup_steps, decay_start, clip_norm, seed, real_files)
        )
        try:
            self.network = TucodecVAE(resolve_codec(preset, codec))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"no network has this shape ({error}): {codec}") from None
        parts = dict(self.network.named_children())
        for name in (*(frozen or ()), *(init_parts or ())):
            if name not in parts:
                raise ConfigError(f"{name!r} is no part of the network; choose of {list(parts)}")
        for name in frozen or ():
            parts[name].requires_grad_(False)
        if self.network.config.rate_proxy == "hard" and "g_a" not in (frozen or ()):
            raise ConfigError("rate_proxy hard teaches g_a nothing: name it in model.frozen")
        if self.network.config.rate_proxy == "hard" and self.network.levels is not None:
            self.network.levels.log_gain.requires_grad_(False)  # h_a alone would teach it
        if not any(p.requires_grad for p in self.network.parameters()):
            raise ConfigError("model.frozen: nothing is left to train")
        self.init_parts = init_parts
        self.klt_start = klt_start
        self.preset = preset
        if muon_iterations < 1:
            raise ConfigError(f"model.muon_iterations starts at 1, got {muon_iterations}")
        self.optimizer, self.muon_iterations = optimizer, muon_iterations
        self.used_centres = torch.zeros(self.network.config.centres, dtype=torch.int64)
        self.network.to(memory_format=torch.channels_last)
        self.code = self.whole(self._code, compile)
        self.terms = self.whole(self._terms, compile)

    def _code(self, x: Tensor, noise: Noise) -> CodecOutput:
        output: CodecOutput = self.network(x, noise)
        return output

    def _terms(self, x: Tensor, noise: Noise) -> RateDistortion:
        if (levels := self.network.levels) is None:
            return self.loss(self._code(x, noise), x)
        level = noise.uniform(x[:, :1, 0, 0], LEVEL)[:, 0] * (levels.count - 1)
        return self.loss.at_levels(self.network(x, noise, level), x, levels.factor(level))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One optimiser for everything: the prior of z needs no auxiliary loss."""
        if self.optimizer == "muon":
            parts = ("g_a", "g_s", "h_a", "h_s", "context", "entropy_parameters")
            return muon_adam(
                self.network,
                parts,
                self.lr,
                iterations=self.muon_iterations,
                dtype=torch.bfloat16 if self.in_bfloat16 else torch.float32,
            )
        trained = [p for p in self.network.parameters() if p.requires_grad]
        return FusedAdam(trained, lr=self.lr)

    @property
    def in_bfloat16(self) -> bool:
        """Whether the training step computes in bfloat16 where it may."""
        return self._trainer is not None and self._trainer.precision == "bf16-mixed"

    def on_fit_start(self) -> None:
        """Check the configuration before the first step."""
        if self.in_bfloat16 and self.device.type == "cpu" and not bfloat16_is_fast():
            print(
                "tucodec: trainer.precision bf16-mixed: this processor has no instructions for "
                "bfloat16, so that it is slower than 32-true",
                file=sys.stderr,
            )
        super().on_fit_start()
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        if self.klt_start and self.is_fresh and isinstance(datamodule, PatchDataModule):
            crops = datamodule.train_dataloader().batches.first(KLT_CROPS).to(self.device)
            try:
                start_as_klt(self.network, crops)
            except ValueError as error:
                raise ConfigError(f"model.klt_start: {error}") from None

    @property
    def shown(self) -> TucodecVAE:
        """The network that validation measures."""
        return self.network

    def on_validation_epoch_start(self) -> None:
        """Count the used centres anew."""
        super().on_validation_epoch_start()
        self.used_centres.zero_()

    def run(self, x: Tensor) -> CodecOutput:
        """See `CodingModule.run`."""
        output: CodecOutput = self.shown(x)
        return output

    def coder(self) -> BeginFile:
        """See `CodingModule.coder`; the transforms run on the training's device."""
        frozen = freeze(self.shown, "validation", {}, torch.float32)
        levels = self.shown.levels
        model = TucModel(frozen, str(self.device), None if levels is None else levels.middle)

        def begin(output: Any, x: Tensor) -> Callable[[], bytes]:
            (latents,) = model.symbols(output.y)
            height, width = x.shape[-2:]
            return lambda: model.write(latents, width, height)

        return begin

    def watch(self, output: Any) -> dict[str, float]:
        """How many values lie beyond the last centres; counts the centres."""
        centres = self.shown.quantizer.centres()
        outside = (output.y < centres[0]) | (output.y > centres[-1])
        self.used_centres += torch.bincount(
            output.index.flatten().cpu(), minlength=len(self.used_centres)
        )
        return {"beyond_ends": float(outside.float().mean())}

    def means(self, rows: list[dict[str, float]]) -> dict[str, float]:
        """Means over the images, and which centres were used."""
        means = super().means(rows)
        used = self.sum_of_ranks(self.used_centres)
        means["centres_used"] = float((used > 0).sum())
        means["centres_dead"] = float((used == 0).sum())
        return means

    def describe(self) -> dict[str, Any]:
        """What is needed to rebuild the network, and what it was trained for."""
        return {
            "codec": _plain(config_to_dict(self.network.config)),
            "recipe": self.recipe,
            "lmbda": self.loss.lmbda,
            "convention": self.loss.convention,
        }

    def warm_start(self, source: str) -> None:
        """Start `init_parts` with the weights of a checkpoint or of an exported model; nothing else is taken.

        The quantiser may be of another kind: learned centres start on the integers that rounding and
        noise use. An exported model has half-precision transforms and entropy networks in fixed point.

        Raises:
            ConfigError: it is damaged or another network.
            ModelFileError: the same of an exported model.
        """
        self.klt_start = False  # these weights are the start
        path = initial_weights(source)
        if path.suffix == MODEL_SUFFIX:
            weights = ModelFile.load(path).network().state_dict()
        else:
            weights = network_weights(load_checkpoint(path))
        weights = self._taken(weights)
        own = {k: tuple(v.shape) for k, v in self._taken(self.network.state_dict()).items()}
        theirs = {name: tuple(value.shape) for name, value in weights.items()}
        differing = [
            name for name, _ in own.items() ^ theirs.items() if not name.startswith("quantizer.")
        ]
        if differing:
            raise ConfigError(f"{path}: another network (differs in {min(differing)}, …)")
        fitting = {name: value for name, value in weights.items() if own.get(name) == value.shape}
        self.network.load_state_dict(fitting, strict=False)

    def _taken(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights of `init_parts` out of a network's weights."""
        parts = self.init_parts
        return {k: v for k, v in state.items() if parts is None or k.partition(".")[0] in parts}


class VAE(CodecModule):
    """Trains a TucodecVAE for rate and distortion; see CodecModule for the arguments."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Rate and distortion of one batch of crops."""
        x = batch["image"].contiguous(memory_format=torch.channels_last)
        terms: RateDistortion = self.terms(x, Noise.of(self.seed, batch["index"]))
        self.images_seen += x.shape[0] * self.trainer.world_size
        self.log_terms(terms)
        return terms.loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip, and log what came in."""
        self.clip_and_log(optimizer)


def bfloat16_is_fast() -> bool:
    """Whether this processor multiplies matrices of bfloat16."""
    return torch.cpu._is_avx512_bf16_supported() or platform.machine() == "aarch64"


def _plain(value: Any) -> Any:
    """Tuples to lists, so that a checkpoint reads like JSON."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if dataclasses.is_dataclass(value):
        raise TypeError(f"{value!r} is not a plain value")
    return value
