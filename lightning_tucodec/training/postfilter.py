"""PostFilter as a LightningModule, and its data: pre-coded patches."""

import copy
import math
from typing import Any

import torch
from torch import Tensor

from lightning_tucodec.codecs.base import MODEL_SUFFIX
from lightning_tucodec.codecs.h266.postfilter import FilterModel
from lightning_tucodec.codecs.library import load_filter
from lightning_tucodec.errors import ConfigError, TucodecError
from lightning_tucodec.nn.postfilter import (
    SIZES,
    DecodedPicture,
    Normal,
    PostFilter,
    PostFilterConfig,
    corrected,
)
from lightning_tucodec.training.data import PatchDataModule
from lightning_tucodec.training.input.precoded import (
    PrecodedBatches,
    PrecodedSamples,
    check_samples,
)
from lightning_tucodec.training.input.validation import in_order
from lightning_tucodec.training.module import ScheduledModule
from lightning_tucodec.training.optimizers import follow, muon_adam
from lightning_tucodec.training.runs.weights import (
    initial_weights,
    load_checkpoint,
    network_weights,
)

_FLOOR = 2e-5
"""Added to squared errors in the loss; 47 dB, beyond which nothing needs to be gained."""


def resolve_size(size: str, overrides: dict[str, Any] | None = None) -> PostFilterConfig:
    """A size with some fields replaced.

    Raises:
        ConfigError: unknown size or field.
    """
    if size not in SIZES:
        raise ConfigError(f"size {size!r} is unknown; choose one of {sorted(SIZES)}")
    try:
        return PostFilterConfig(**{**vars(SIZES[size]), **(overrides or {})})
    except TypeError as error:
        raise ConfigError(f"network: {error}") from None


class PostFilterModule(ScheduledModule):
    """Trains a PostFilter, and keeps an exponential moving average of its weights.

    The loss of a crop is its squared error in RGB over that of the plain conversion, with the
    corrections weighted as an encoder would weight them for it. So it begins at one, and every crop
    has the same weight for any texture and QP. Minimising it raises the mean of the crops' PSNR gains, which
    is the reported measure, rather than the PSNR of the worst crops.

    Args:
        size: of the network, see `nn.postfilter.SIZES`.
        network: replaced fields of the size.
        lr: learning rate on the plateau (Muon for the residual blocks, Adam for the rest).
        final_lr: learning rate at the end.
        warmup_steps: length of the warm-up.
        decay_start: fraction of `max_steps` at which the cosine begins.
        clip_norm: gradients are scaled down to this norm.
        ema: share of the old average that a step keeps, once the average is old enough.
        teacher: name or file of an exported filter to learn from. Of a crop's error a few per cent can be
            foreseen and the rest is noise to whoever learns from the original; what a good filter makes
            of the crop has none of it (Hinton et al., "Distilling the Knowledge in a Neural Network", 2015).
        teacher_share: of what is learned from, between the original (0) and the teacher's picture (1).
        compile: see `training.vae.CodecModule`.
    """

    def __init__(
        self,
        size: str = "fast",
        network: dict[str, Any] | None = None,
        lr: float = 2e-3,
        final_lr: float = 0.0,
        warmup_steps: int = 30,
        decay_start: float = 0.5,
        clip_norm: float = 1.0,
        ema: float = 0.998,
        teacher: str | None = None,
        teacher_share: float = 0.8,
        compile: bool = False,
    ) -> None:
        super().__init__(lr, final_lr, warmup_steps, decay_start, clip_norm)
        try:
            self.network = PostFilter(resolve_size(size, network))
        except (ValueError, TypeError, RuntimeError) as error:
            raise ConfigError(f"no network has this shape ({error}): {network}") from None
        self.network.to(memory_format=torch.channels_last)
        self.averaged = copy.deepcopy(self.network).requires_grad_(False)
        self.size, self.decay = size, ema
        if not 0 <= teacher_share <= 1:
            raise ConfigError(f"teacher_share {teacher_share}: must lie between 0 and 1")
        # A FilterModel is no module, so the teacher is in no checkpoint. It goes to the training's device;
        # the library's own object codes, and stays on the CPU.
        self.teacher = None if teacher is None else FilterModel(load_filter(teacher).file)
        self.teacher_share = teacher_share
        self.ratios = self.whole(self._ratios, compile)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Muon for the residual blocks, Adam for the rest."""
        return muon_adam(self.network, ("body",), self.lr)

    def warm_start(self, source: str) -> None:
        """Take over the averaged weights of a checkpoint or run folder, or those of an exported filter.

        A network of fewer blocks or corrections gives the first ones; new blocks start close to the identity.

        Raises:
            ConfigError: the source is of another network.
        """
        try:
            path = initial_weights(source)
            if path.suffix == MODEL_SUFFIX:
                weights = load_filter(path).network.state_dict()
            else:
                weights = network_weights(load_checkpoint(path))
            for name, fresh in self.network.state_dict().items():
                if name.startswith(("body.", "modulation.out.", "tail.")):
                    known = weights.get(name, fresh[:0])
                    weights[name] = torch.cat([known, fresh[len(known) :]])
            self.network.load_state_dict(weights)
        except (OSError, KeyError, RuntimeError, TucodecError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"run.init_from {source}: {reason}") from None
        self.averaged.load_state_dict(self.network.state_dict())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Relative squared error of one batch of crops."""
        picture, image = _picture(batch), batch["image"]
        target = self._target(picture, image)
        ratio, gained = self.ratios(picture, image, target)
        loss: Tensor = ratio.mean()
        self.images_seen += len(ratio) * self.trainer.world_size
        if self.logging_is_due:
            gain = -10 * gained.log10().mean()
            self.log_step({"train/loss": loss, "train/gain": gain}, {"gain": gain})
        return loss

    def _ratios(
        self, picture: DecodedPicture, image: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Errors over those of the plain conversion, (N,): to the target, and to the original."""
        shown = _shown(self.network(picture), picture, target)
        plain = _errors(picture.plain, image) + _FLOOR
        gained = (_errors(shown.detach(), image) + _FLOOR) / plain
        return (_errors(shown, target) + _FLOOR) / plain, gained

    @torch.no_grad()
    def _target(self, picture: DecodedPicture, image: Tensor) -> Tensor:
        """The training target of a crop: the original, or a mixture of it and the teacher's picture."""
        if self.teacher is None:
            return image
        teacher = self.teacher.network.to(self.device)
        return image.lerp(_shown(teacher.ensemble(picture), picture, image), self.teacher_share)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip, and log what came in."""
        self.clip_and_log(optimizer)

    @torch.no_grad()
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Update the average of the weights; its decay is faster at the start of a run."""
        follow(self.averaged, self.network, self.decay, self.opt_step, self.found_inf)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """PSNR of the averaged network and of the plain conversion on 8-bit patches."""
        picture = _picture(batch)
        shown = _shown(self.averaged(picture), picture, batch["image"])
        errors = [_errors(_eight_bits(x), batch["image"]) for x in (shown, picture.plain)]
        for index, qp, filtered, plain in zip(batch["index"], picture.qp, *errors, strict=True):
            values = [-10 * math.log10(max(float(error), 1e-7)) for error in (filtered, plain)]
            self.validation_rows.append(
                {"index": float(index), "qp": float(qp), "psnr": values[0], "plain": values[1]}
            )

    def means(self, rows: list[dict[str, float]]) -> dict[str, float]:
        """Mean PSNR and gain, of all patches and by QP."""
        gains = [row["psnr"] - row["plain"] for row in rows]
        means = {
            "psnr": sum(row["psnr"] for row in rows) / len(rows),
            "gain": sum(gains) / len(rows),
            "better": sum(gain > 0 for gain in gains) / len(rows),
        }
        for qp in sorted({row["qp"] for row in rows}):
            own = [gain for gain, row in zip(gains, rows, strict=True) if row["qp"] == qp]
            means[f"gain_qp{qp:g}"] = sum(own) / len(own)
        return means

    def describe(self) -> dict[str, Any]:
        """The network's shape and what marks it as a post-filter."""
        return {"postfilter": dict(vars(self.network.config)), "size": self.size}


class PrecodedDataModule(PatchDataModule):
    """Training crops from pre-coded shards, validation on all patches of others.

    Args:
        shards: folder made by `tucodec shards precode`.
        batch_size: the global batch, over all ranks.
        crop: side of the random crop, even; None takes whole patches.
        num_workers: decoding processes per rank.
        seed: decides order and augmentation.
        val_images: pre-coded shards of photographs that are held out.
        flip: mirror half of the patches left to right.
    """

    batches_class = PrecodedBatches

    def __init__(
        self,
        shards: str,
        batch_size: int,
        crop: int | None = 96,
        num_workers: int = 0,
        seed: int = 0,
        val_images: str | None = None,
        flip: bool = True,
    ) -> None:
        super().__init__(shards, batch_size, crop, num_workers, seed, val_images, flip)

    @classmethod
    def check_validation(cls, location: str) -> int:
        """See `check_samples`."""
        return check_samples(location)

    def val_dataloader(self) -> Any:
        """All patches, in batches with the fields of `PrecodedBatches`."""
        if self.val_images is None:
            return []
        return in_order(PrecodedSamples(self.val_images), *self._place())


def _picture(batch: dict[str, Tensor]) -> DecodedPicture:
    return DecodedPicture(*(batch[name] for name in DecodedPicture._fields))


def _shown(corrections: Tensor, picture: DecodedPicture, image: Tensor) -> Tensor:
    """RGB with the weights that fit each image best.

    The gradient passes the weights by: where the squared error is least, it does not depend on them.
    """
    weights = Normal.of(corrections.detach(), image - picture.plain).weights()
    return corrected(picture.plain, corrections, weights)


def _errors(x: Tensor, original: Tensor) -> Tensor:
    """Mean squared error of each image."""
    return (x - original).square().flatten(1).mean(1)


def _eight_bits(x: Tensor) -> Tensor:
    """The 8-bit picture that a decoder shows."""
    return (x.clamp(0, 1) * 255).round() / 255
