#!/usr/bin/env python3
"""The one-GPU hour: `fast` and `paper` at one λ each, in pieces of a few minutes; README.md says how.

    hour.py pack SHARDS… --out crops.pack      on any machine, once
    hour.py plan fast --minutes 25             on the GPU: measures a step, says what fits
    hour.py train fast --minutes 9             on the GPU, again and again until it says "finished"

Needs what `make gpu` needs. A piece that is cut off loses what it did since its last save, at most a minute.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from lightning_tucodec.bench.complexity import step_flops
from lightning_tucodec.bench.step import Clock, bare_trainer
from lightning_tucodec.bench.train import matmul_peak
from lightning_tucodec.cli.arguments import count, positive
from lightning_tucodec.codecs.base import MODEL_SUFFIX
from lightning_tucodec.codecs.learned.model_file import freeze
from lightning_tucodec.errors import ConfigError, TucodecError, first_sentence, reason
from lightning_tucodec.io.temporary import atomic_write
from lightning_tucodec.training.advice import without_advice
from lightning_tucodec.training.arithmetic import arithmetic
from lightning_tucodec.training.input.resident import ResidentDataModule, pack
from lightning_tucodec.training.runs.weights import load_checkpoint
from lightning_tucodec.training.runs.writer import SaveError
from lightning_tucodec.training.vae import VAE

LMBDA = 512.0
"""Of the recipe "mse": about 0.35 bpp on photographs."""

PLANS: dict[str, dict[str, Any]] = {
    "fast": {"minutes": 25.0, "batch": 16, "crop": 256},
    "paper": {"minutes": 30.0, "batch": 16, "crop": 256},
    "tiny": {"minutes": 5.0, "batch": 16, "crop": 256},
}
MODEL: dict[str, Any] = {
    "recipe": "mse", "lr": 3e-4, "final_lr": 1e-6, "decay_start": 0.6, "warmup_steps": 200,
}  # fmt: skip

SHARE = 0.95
"""Of the minutes is given to steps; the rest is for imports, saves and a slower clock."""

WARM, MEASURED = 5, 20  # steps
SAVE_SECONDS = 60.0
LOG_STEPS = 100


class Steps(pl.Callback):
    """Times steps; saves; stops the piece when its time is over or its steps are done.

    Args:
        device: of the training.
        end: of the piece, by `time.monotonic`.
        path: of the checkpoint; None saves nothing.
        journal: file that gets a line every LOG_STEPS steps.
    """

    def __init__(self, device: str, end: float, path: Path | None, journal: Path | None) -> None:
        self.clock = Clock(device, WARM, MEASURED)
        self.end, self.path, self.journal = end, path, journal
        self.saved = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
        """After the module counted its step."""
        self.clock.tick()
        if module.opt_step % trainer.log_every_n_steps == 0 and self.journal is not None:
            values = {k: round(float(v), 6) for k, v in trainer.callback_metrics.items()}
            line = {"step": module.opt_step, "time": round(time.time(), 1), **values}
            with self.journal.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
        now = time.monotonic()
        trainer.should_stop = now > self.end
        last = trainer.should_stop or module.opt_step == trainer.max_steps
        if self.path is not None and (last or now - self.saved > SAVE_SECONDS):
            self.save(trainer, module)

    def save(self, trainer: pl.Trainer, module: Any) -> None:
        """Sound weights only, whole or not at all."""
        assert self.path is not None
        module.check_finite()
        part = self.path.with_suffix(".part")
        try:
            trainer.save_checkpoint(part)
            os.replace(part, self.path)
        # The zip writer of PyTorch turns "disk full" into a RuntimeError.
        except (OSError, RuntimeError) as error:
            part.unlink(missing_ok=True)
            raise SaveError(f"{self.path}: not saved ({error}); what is there is intact") from None
        self.saved = time.monotonic()


def fit(
    plan: dict[str, Any], crops: Path, device: str, steps: Steps, resume: Path | None = None,
    network: dict[str, Any] | None = None,
) -> VAE:  # fmt: skip
    """One piece of a training."""
    torch.manual_seed(0)
    module = VAE(preset=plan["preset"], lmbda=plan["lmbda"], codec=network, **MODEL)
    data = ResidentDataModule(str(crops), plan["batch"], plan["crop"])
    trainer = bare_trainer(
        device, plan["steps"], plan["precision"], callbacks=[steps], log_every_n_steps=LOG_STEPS
    )
    with arithmetic("fast"):
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return module


def make_plan(
    preset: str, minutes: float, crops: Path, device: str, lmbda: float = LMBDA,
    batch: int | None = None, crop: int | None = None, network: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure a step and say how many fit into some minutes.

    Returns:
        What `train` needs (preset, lmbda, steps, batch, crop, precision) and what was measured.
    """
    usual = PLANS[preset]
    plan = {
        "preset": preset,
        "lmbda": lmbda,
        "steps": WARM + MEASURED,
        "batch": batch or usual["batch"],
        "crop": crop or usual["crop"],
        "precision": "bf16-mixed" if device == "cuda" else "32-true",
    }
    steps = Steps(device, float("inf"), None, None)
    module = fit(plan, crops, device, steps, network=network)
    seconds = steps.clock.seconds
    assert seconds is not None
    flops = step_flops(module.cpu(), plan["batch"], plan["crop"])
    peak = matmul_peak(device, torch.bfloat16 if device == "cuda" else torch.float32)
    count = max(1, int(60 * minutes * SHARE / seconds))
    return {
        **plan,
        "steps": count,
        "minutes": minutes,
        "step_s": round(seconds, 5),
        "expected_minutes": round(count * seconds / 60, 2),
        "images": count * plan["batch"],
        "flop_per_step": flops,
        "flop": flops * count,
        "share_of_matmul_peak": round(flops / seconds / peak, 4),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }


def train(
    folder: Path, crops: Path, minutes: float, device: str, network: dict[str, Any] | None = None
) -> bool:
    """Go on with the training that `folder/plan.json` describes, for some minutes; whether it is finished.

    Raises:
        ConfigError: there is no plan.
    """
    try:
        plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        name = f"hour-{plan['preset']}-{plan['lmbda']:g}"
        for key in ("steps", "batch", "crop", "precision", "device"):
            plan[key]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"{folder / 'plan.json'}: no plan ({error}); `hour.py plan` makes one"
        ) from None
    path, model = folder / "last.ckpt", folder / f"{name}{MODEL_SUFFIX}"
    resume = path if path.exists() else None
    done = load_checkpoint(path)["tucodec"]["opt_step"] if resume else 0
    was = done
    if done < plan["steps"]:
        steps = Steps(device, time.monotonic() + 60 * minutes, path, folder / "log.jsonl")
        done = fit(plan, crops, device, steps, resume, network).opt_step
        print(f"{done} of {plan['steps']} steps")
    if done < plan["steps"]:
        return False
    if done > was or not model.exists():  # a piece may have been cut off after its last save
        trained = load_checkpoint(path)
        module = VAE(preset=plan["preset"], lmbda=plan["lmbda"], codec=network, **MODEL)
        module.load_state_dict(trained["state_dict"])
        counted = {key: trained["tucodec"][key] for key in ("opt_step", "images_seen")}
        card = {**module.describe(), **counted, "trained_on": plan["device"]}
        freeze(module.network.eval(), name, card).save(model)
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="hour.py", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="patches of shards into one small file")
    packing.add_argument("shards", nargs="+")
    packing.add_argument("--out", type=Path, default=Path("crops.pack"))
    packing.add_argument("--limit-mb", type=positive, default=45.0, help="10^6 bytes")
    for name, summary in (("plan", "measure a step"), ("train", "train one piece")):
        sub = commands.add_parser(name, help=summary)
        sub.add_argument("preset", choices=PLANS)
        sub.add_argument("--crops", type=Path, default=Path("crops.pack"))
        sub.add_argument("--out", type=Path, default=Path("hour"), help="folder of the runs")
        sub.add_argument("--minutes", type=positive, help="of the training; of this piece (9)")
        sub.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
        if name == "plan":
            sub.add_argument("--lmbda", type=positive, default=LMBDA)
            sub.add_argument("--batch", type=count)
            sub.add_argument("--crop", type=count)
    arguments = parser.parse_args(argv)
    try:
        with without_advice():
            return _run(arguments)
    except (TucodecError, OSError, MemoryError) as error:
        print(f"hour.py: {reason(error)}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        print(f"hour.py: {first_sentence(error)}; take a smaller --batch", file=sys.stderr)
        return 1


def _run(arguments: argparse.Namespace) -> int:
    if arguments.command == "pack":
        packed = pack(arguments.shards, arguments.out, int(1e6 * arguments.limit_mb))
        print(
            f"{arguments.out}: {packed.patches} patches, {packed.bytes} bytes, {packed.psnr:.1f} dB"
        )
        return 0
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("there is no CUDA GPU here; --device cpu tries it out")
    folder = arguments.out / arguments.preset
    if arguments.command == "train":
        # A little less than was asked for, so that the last save fits.
        minutes = 9.0 if arguments.minutes is None else arguments.minutes
        finished = train(folder, arguments.crops, minutes - min(0.75, minutes / 4), device)
        print("finished" if finished else "to be continued: the same command again")
        return 0
    if (folder / "last.ckpt").exists():
        raise ConfigError(f"{folder}: has begun with another plan; choose another --out")
    # What cannot be written is told before the measurement.
    folder.mkdir(parents=True, exist_ok=True)
    minutes = arguments.minutes or PLANS[arguments.preset]["minutes"]
    plan = make_plan(
        arguments.preset, minutes, arguments.crops, device, arguments.lmbda, arguments.batch, arguments.crop
    )  # fmt: skip
    with atomic_write(folder / "plan.json", "w") as stream:
        json.dump(plan, stream, indent=1)
    for key, value in plan.items():
        print(f"{key}: {value:.4g}" if isinstance(value, float) else f"{key}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
