"""TucodecVAE as a LightningModule: the MSE and the MS-SSIM recipe."""

import dataclasses
import math
import platform
import sys
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor

from lightning_tucodec.codecs.base import MODEL_SUFFIX
from lightning_tucodec.codecs.learned.codec import TucModel
from lightning_tucodec.codecs.learned.model_file import ModelFile, freeze
from lightning_tucodec.errors import ConfigError, ModelFileError
from lightning_tucodec.io.images import write_png
from lightning_tucodec.nn.codec import (
    PRESETS,
    CodecConfig,
    TucodecVAE,
    config_from_dict,
    config_to_dict,
)
from lightning_tucodec.nn.klt import start_as_klt
from lightning_tucodec.nn.losses import check_crop, make_loss
from lightning_tucodec.quality.metrics import ms_ssim, psnr
from lightning_tucodec.training.data import PatchDataModule
from lightning_tucodec.training.module import ScheduledModule
from lightning_tucodec.training.noise import SampleNoise
from lightning_tucodec.training.optimizers import muon_adam
from lightning_tucodec.training.runs.weights import (
    initial_weights,
    load_checkpoint,
    network_weights,
)

KLT_CROPS = 256
"""Training crops that `klt_start` looks at."""

PICTURES = 3
"""Validation images that a picture is kept of, one each at every validation."""


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
    values: dict[str, Any] = config_to_dict(PRESETS[preset])
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


class CodecModule(ScheduledModule):
    """What all trainings of a TucodecVAE share: noise, validation, checkpoint entries.

    The quantisers' noise of a sample is a function of the seed and of its position, so that a resumed run
    and any number of ranks draw the same. Learning rate and clipping: `ScheduledModule`.

    Args:
        recipe: "transparent" (λ·MSE + bpp) or "ssim" (0.2·MSE + 0.8·(1 − MS-SSIM) + λ·bpp).
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
    """

    def __init__(
        self,
        recipe: str = "transparent",
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
    ) -> None:
        super().__init__(lr, final_lr, warmup_steps, decay_start, clip_norm)
        self.recipe = recipe
        self.loss = make_loss(recipe, lmbda)
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
        if not any(p.requires_grad for p in self.network.parameters()):
            raise ConfigError("model.frozen: nothing is left to train")
        self.init_parts = init_parts
        self.klt_start = klt_start
        if real_files is not None and real_files < 0:
            raise ConfigError(f"model.real_files: must be 0 or more, got {real_files}")
        self.real_files = real_files
        self.preset = preset
        if muon_iterations < 1:
            raise ConfigError(f"model.muon_iterations starts at 1, got {muon_iterations}")
        self.optimizer, self.muon_iterations = optimizer, muon_iterations
        self.seed = seed
        self.used_centres = torch.zeros(self.network.config.centres, dtype=torch.int64)
        self.network.to(memory_format=torch.channels_last)

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
        return torch.optim.Adam(trained, lr=self.lr, fused=True)

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
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(datamodule, PatchDataModule):
            return
        batches = datamodule.train_dataloader().batches
        check_crop(self.recipe, batches.crop)
        if self.klt_start and self.is_fresh:
            crops = batches.first(KLT_CROPS).to(self.device)
            try:
                start_as_klt(self.network, crops)
            except ValueError as error:
                raise ConfigError(f"model.klt_start: {error}") from None

    @property
    def shown(self) -> TucodecVAE:
        """The network that validation measures."""
        return self.network

    def on_validation_epoch_start(self) -> None:
        """Freeze the network as an export would, and forget the last validation's numbers."""
        super().on_validation_epoch_start()
        self.used_centres.zero_()
        self.coder: TucModel | None = None
        try:
            frozen = freeze(self.shown, "validation", {}, torch.float32)
            self.coder = TucModel(frozen, str(self.device))
        except ModelFileError as error:  # a state of training, and no reason to end it
            if self.trainer.is_global_zero:
                print(f"step {self.opt_step}: no real files, {error}", file=sys.stderr)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Rate of the hard symbols and of a real file, distortion of the 8-bit image; one a batch.

        Computed in float32 for any training precision, as when files are written.
        """
        with torch.autocast(self.device.type, enabled=False):
            self._measure(batch)

    def _measure(self, batch: dict[str, Tensor]) -> None:
        x = batch["image"]
        output = self.shown(x)
        pixels = x.shape[-1] * x.shape[-2]
        bits_y, bits_z = output.bits()
        x_hat = (output.x_hat.clamp(0, 1) * 255).round() / 255
        centres = self.shown.quantizer.centres()
        outside = (output.y < centres[0]) | (output.y > centres[-1])
        self.used_centres += torch.bincount(
            output.index.flatten().cpu(), minlength=len(self.used_centres)
        )
        row = {
            "index": float(batch["index"][0]),
            "bpp_y": float(bits_y.mean()) / pixels,
            "bpp_z": float(bits_z.mean()) / pixels,
            "psnr": float(psnr(x_hat, x).mean()),
            "ms_ssim": float(ms_ssim(x_hat, x).mean()),
            "beyond_ends": float(outside.float().mean()),
            "loss": float(self.loss(output, x).loss),
        }
        chosen = self.real_files is None or row["index"] < self.real_files
        if self.coder is not None and chosen:
            (latents,) = self.coder.symbols(output.y)
            file = self.coder.write(latents, x.shape[-1], x.shape[-2])
            row["real_bpp"] = 8 * len(file) / pixels
        self.validation_rows.append(row)
        if self.trainer.is_global_zero and self.trainer.loggers:
            self.keep_picture(int(batch["index"][0]), eight_bits(x), eight_bits(x_hat))

    def keep_picture(
        self, number: int, original: NDArray[np.uint8], shown: NDArray[np.uint8]
    ) -> None:
        """Original and reconstruction side by side, of the first images."""
        if number < PICTURES:
            panels = np.concatenate([original, shown], axis=1)
            write_png(self.picture_path(str(number) if number else ""), panels)

    def means(self, rows: list[dict[str, float]]) -> dict[str, float]:
        """Means over the images, and which centres were used."""
        names = [name for name in rows[0] if name != "index"]
        having = {name: [row for row in rows if name in row] for name in names}
        means = {
            name: sum(row[name] for row in found) / len(found) for name, found in having.items()
        }
        means["bpp"] = means["bpp_y"] + means["bpp_z"]
        used = self.trainer.strategy.reduce(self.used_centres.to(self.device), reduce_op="sum")
        assert isinstance(used, Tensor)
        means["centres_used"] = float((used > 0).sum())
        means["centres_dead"] = float((used == 0).sum())
        if "real_bpp" in means:
            ratio = means["real_over_estimated"] = sum(
                row["real_bpp"] for row in having["real_bpp"]
            ) / sum(row["bpp_y"] + row["bpp_z"] for row in having["real_bpp"])
            # The container's header is part of the file; small images may exceed this.
            if ratio > 1.01 and self.trainer.is_global_zero:
                text = f"step {self.opt_step}: real files are {ratio:.3f} times the estimated bits"
                print(text, file=sys.stderr)
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
        """Of a network's weights those of `init_parts`."""
        parts = self.init_parts
        return {k: v for k, v in state.items() if parts is None or k.partition(".")[0] in parts}


class VAE(CodecModule):
    """Trains a TucodecVAE for rate and distortion; see CodecModule for the arguments."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Rate and distortion of one batch of crops."""
        x = batch["image"].contiguous(memory_format=torch.channels_last)
        with SampleNoise(self.seed, batch["index"], x.device):
            output = self.network(x)
        terms = self.loss(output, x)
        self.images_seen += x.shape[0] * self.trainer.world_size
        values = {
            "train/loss": terms.loss,
            "train/bpp": terms.bpp_y + terms.bpp_z,
            "train/bpp_z": terms.bpp_z,
            "train/psnr": terms.mse,
        }
        means = torch.stack([value.detach() for value in values.values()])
        if self.logging_is_due:  # not by sync_dist: Lightning wants it the same in every step
            means = self.trainer.strategy.reduce(means, reduce_op="mean")
        # In dB only now: the mean of the ranks' decibels would depend on their number.
        means[-1] = -10 * means[-1].log10()
        self.log_dict(dict(zip(values, means, strict=True)))
        self.log("bpp", (terms.bpp_y + terms.bpp_z).detach(), prog_bar=True, logger=False)
        self.log("dB", -10 * terms.mse.detach().log10(), prog_bar=True, logger=False)
        return terms.loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip, and log what came in."""
        self.log("train/grad_norm", self.clip(optimizer))


def bfloat16_is_fast() -> bool:
    """Whether this processor multiplies matrices of bfloat16."""
    return torch.cpu._is_avx512_bf16_supported() or platform.machine() == "aarch64"


def eight_bits(x: Tensor) -> NDArray[np.uint8]:
    """The first image of a batch in [0, 1] as H×W×3."""
    image = (x[0] * 255).round().to(torch.uint8).permute(1, 2, 0)
    return np.ascontiguousarray(image.cpu().numpy())


def _plain(value: Any) -> Any:
    """Tuples to lists, so that a checkpoint reads like JSON."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if dataclasses.is_dataclass(value):
        raise TypeError(f"{value!r} is not a plain value")
    return value
