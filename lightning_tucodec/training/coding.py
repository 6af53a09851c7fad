"""What all trainings of image codecs share: the recipe, validation with real files, pictures."""

import contextlib
import sys
from collections.abc import Callable

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_tucodec.errors import ConfigError, ModelFileError
from lightning_tucodec.io.images import write_png
from lightning_tucodec.nn.losses import (
    RateDistortion,
    Reconstruction,
    check_crop,
    make_loss,
)
from lightning_tucodec.nn.recipes import recipe_name
from lightning_tucodec.quality.metrics import ms_ssim, psnr
from lightning_tucodec.training.data import PatchDataModule
from lightning_tucodec.training.files import FileWorkers, threads_beside
from lightning_tucodec.training.module import ScheduledModule

BeginFile = Callable[[Reconstruction, Tensor], Callable[[], bytes]]
"""What `CodingModule.coder` returns."""

PICTURES = 3
"""Validation images that a picture is kept of, one each at every validation."""


class CodingModule(ScheduledModule):
    """Recipe, validation and averages of a training whose network codes images.

    Args:
        recipe: see `nn.losses.make_loss`.
        lmbda: λ in that recipe's convention.
        lr, final_lr, warmup_steps, decay_start, clip_norm: see `ScheduledModule`.
        seed: of what is drawn for samples or steps.
        real_files: number of validation images, from the first, that are coded to real files; None: all.
    """

    def __init__(
        self,
        recipe: str,
        lmbda: float,
        lr: float,
        final_lr: float,
        warmup_steps: int,
        decay_start: float,
        clip_norm: float,
        seed: int,
        real_files: int | None,
    ) -> None:
        super().__init__(lr, final_lr, warmup_steps, decay_start, clip_norm)
        self.recipe = recipe_name(recipe)
        self.loss = make_loss(recipe, lmbda)
        if real_files is not None and real_files < 0:
            raise ConfigError(f"model.real_files: must be 0 or more, got {real_files}")
        self.real_files = real_files
        self.files = FileWorkers()
        self.seed = seed

    # --- What a network of its own kind says of itself --------------------------------------------

    def run(self, x: Tensor) -> Reconstruction:
        """The network that validation measures, on one image 1×3×H×W in [0, 1]."""
        raise NotImplementedError

    def coder(self) -> BeginFile:
        """What begins the file of an image, given what `run` made of it, with the present weights.

        It does what needs the device, and returns what finishes the file, in any thread (`FileWorkers`).

        Raises:
            ModelFileError: no files can be written in this state of the training.
        """
        raise NotImplementedError

    def watch(self, output: Reconstruction) -> dict[str, float]:
        """Further entries of an image's row."""
        return {}

    def auxiliary_loss(self) -> Tensor | None:
        """A loss of the network's own beside rate and distortion."""
        return None

    # --- Training ----------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Check the crops before the first step."""
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(datamodule, PatchDataModule):
            check_crop(self.recipe, datamodule.train_dataloader().batches.crop)

    def log_terms(self, terms: RateDistortion) -> None:
        """Log a batch's terms, as means over the ranks, in steps that log."""
        if not self.logging_is_due:
            return
        values = (terms.loss, terms.bpp_y + terms.bpp_z, terms.bpp_z, terms.mse)
        means = torch.stack([value.detach() for value in values])
        loss, bpp, bpp_z, mse = self.mean_of_ranks(means)
        # In dB only now: the mean of the ranks' decibels would depend on their number.
        psnr = -10 * mse.log10()
        self.log_step(
            {"train/loss": loss, "train/bpp": bpp, "train/bpp_z": bpp_z, "train/psnr": psnr},
            {"bpp": bpp, "dB": psnr},
        )

    def without_reduction(self) -> contextlib.AbstractContextManager[None]:
        """In this block backward passes do not start DDP's own reduction, which supports one a batch."""
        inside = getattr(self.trainer.model, "no_sync", contextlib.nullcontext)
        return inside()

    def average_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Means over the ranks, by one all-reduce; for backward passes outside DDP's own reduction."""
        if self.trainer.world_size == 1:
            return
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = self.mean_of_ranks(torch.cat([g.flatten() for g in grads]))
        for g, mean in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            g.copy_(mean.view(g.shape))

    # --- Validation --------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[pl.Callback]:
        """The workers learn of exceptions."""
        return [self.files]

    def on_validation_epoch_start(self) -> None:
        """Freeze the network as an export would, and forget the last validation's numbers."""
        super().on_validation_epoch_start()
        self.begin_file: BeginFile | None = None
        try:
            self.begin_file = self.coder()
            self.files.begin(threads_beside(self.device))
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
        output = self.run(x)
        pixels = x.shape[-1] * x.shape[-2]
        bits_y, bits_z = output.bits()
        x_hat = (output.x_hat.clamp(0, 1) * 255).round() / 255
        read = numbers_of(
            {
                "index": batch["index"][0],
                "bits_y": bits_y.mean(),
                "bits_z": bits_z.mean(),
                "psnr": psnr(x_hat, x).mean(),
                "ms_ssim": ms_ssim(x_hat, x).mean(),
                "loss": self.loss(output, x).loss,
            }
        )
        row = {
            "index": read["index"],
            "bpp_y": read["bits_y"] / pixels,
            "bpp_z": read["bits_z"] / pixels,
            "psnr": read["psnr"],
            "ms_ssim": read["ms_ssim"],
            **self.watch(output),
            "loss": read["loss"],
        }
        chosen = self.real_files is None or row["index"] < self.real_files
        if self.begin_file is not None and chosen:
            finished = self.begin_file(output, x)

            def count() -> None:
                row["real_bpp"] = 8 * len(finished()) / pixels

            self.files.do(count)
        self.validation_rows.append(row)
        # What is not kept does not leave the device.
        if self.trainer.loggers and (number := int(row["index"])) < PICTURES:
            self.keep_picture(number, eight_bits(x), eight_bits(x_hat))

    def _log_means(self, stage: str) -> None:
        self.files.finish()  # all rows are complete
        super()._log_means(stage)

    def keep_picture(
        self, number: int, original: NDArray[np.uint8], shown: NDArray[np.uint8]
    ) -> None:
        """Original and reconstruction side by side."""
        panels = np.concatenate([original, shown], axis=1)
        write_png(self.picture_path(str(number) if number else ""), panels)

    def means(self, rows: list[dict[str, float]]) -> dict[str, float]:
        """Means over the images."""
        names = [name for name in rows[0] if name != "index"]
        having = {name: [row for row in rows if name in row] for name in names}
        means = {
            name: sum(row[name] for row in found) / len(found) for name, found in having.items()
        }
        means["bpp"] = means["bpp_y"] + means["bpp_z"]
        if "real_bpp" in means:
            ratio = means["real_over_estimated"] = sum(
                row["real_bpp"] for row in having["real_bpp"]
            ) / sum(row["bpp_y"] + row["bpp_z"] for row in having["real_bpp"])
            # The container's header is part of the file; small images may exceed this.
            if ratio > 1.01 and self.trainer.is_global_zero:
                text = f"step {self.opt_step}: real files are {ratio:.3f} times the estimated bits"
                print(text, file=sys.stderr)
        return means

    # --- Several ranks -----------------------------------------------------------------------------

    def sum_of_ranks(self, values: Tensor) -> Tensor:
        """Sums over the ranks, enqueued on the device.

        Lightning's `strategy.reduce` comes after a barrier: under NCCL the host waits there until the GPU has
        nothing left to do.
        """
        total = values.to(self.device, copy=True)
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(total)
        return total

    def mean_of_ranks(self, values: Tensor) -> Tensor:
        """Means over the ranks, see `sum_of_ranks`."""
        return self.sum_of_ranks(values) / self.trainer.world_size


def numbers_of(values: dict[str, Tensor]) -> dict[str, float]:
    """Scalars of float32 or less, by name, read with one wait for the device."""
    stacked = torch.stack([value.detach().float() for value in values.values()])
    return dict(zip(values, stacked.tolist(), strict=True))


def eight_bits(x: Tensor) -> NDArray[np.uint8]:
    """The first image of a batch in [0, 1] as H×W×3."""
    image = (x[0] * 255).round().to(torch.uint8).permute(1, 2, 0)
    return np.ascontiguousarray(image.cpu().numpy())
