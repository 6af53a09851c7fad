"""Options of the command line and of Lightning's trainer that a run cannot honour: refused, never ignored."""

from typing import Any

from lightning_tucodec.errors import ConfigError
from lightning_tucodec.io.processes import cores
from lightning_tucodec.training.runs.identity import DEFAULT_MODEL, arguments, trainer_default

REFUSED = {
    "optimizer": "the model has its own: model.lr and the like",
    "lr_scheduler": "the model has its own: model.warmup_steps and the like",
    "weights_only": "checkpoints are always read so",
    "trainer.logger": "metrics.jsonl is the log, and run.wandb shows it",
    "trainer.callbacks": "the hooks of a model of your own (model.class_path) can do it",
    "trainer.enable_checkpointing": "run.checkpoint_minutes says when a run saves",
    "trainer.default_root_dir": "run.runs_dir says where runs are",
    "trainer.enable_autolog_hparams": "config.yaml and the manifest hold them",
    "trainer.model_registry": "`tucodec export` makes model files",
    "trainer.accumulate_grad_batches": "a stop within a step would lose batches; GANCodec has model.pieces",
    "trainer.limit_predict_batches": "there is no predict; `tucodec compress` codes images",
    "trainer.fast_dev_run": "it would leave no metrics; a low trainer.max_steps tries a run out",
    "trainer.barebones": "a run needs its log and its checkpoints",
    "trainer.overfit_batches": "the data plan goes on through all samples; build shards of a few photographs",
    "trainer.reload_dataloaders_every_n_epochs": "the data would begin anew",
    "trainer.max_time": "`timeout -s USR1 SECONDS tucodec fit …` saves, and ends with status 75",
    "trainer.min_epochs": "a run that is told to stop could not; trainer.max_steps ends one",
    "trainer.min_steps": "a run that is told to stop could not; trainer.max_steps ends one",
}
"""What to do instead. The `config.yaml` of a run holds these at their defaults, which are accepted."""

_CHOSEN = {"ckpt_path": "a run goes on from its newest checkpoint; run.init_from starts a new one"}
"""Refused by `fit` alone."""


_CLIPPING = ("gradient_clip_val", "gradient_clip_algorithm")
"""For models of the user's own."""

_PRECISIONS = ("None", "32", "32-true", "bf16", "bf16-mixed")
"""Of models of this package: their batches, rate terms and averages are float32."""


def check_options(config: dict[str, Any], command: str = "fit") -> None:
    """Refuse what would have no effect.

    Args:
        config: resolved.
        command: `fit`, `validate` or `test`.

    Raises:
        ConfigError: which option it is, and what to do instead.
    """
    for name, reason in (REFUSED | (_CHOSEN if command == "fit" else {})).items():
        group, _, option = name.rpartition(".")
        value = (config[group] if group else config).get(option)
        default = trainer_default(option) if group else None
        if value is not None and value != default:
            raise ConfigError(f"{name}: is not for `tucodec {command}`: {reason}")
    trainer = config["trainer"]
    clips = [name for name in _CLIPPING if trainer.get(name) is not None]
    if clips and "clip_norm" in arguments(config, "model"):
        raise ConfigError(
            f"trainer.{clips[0]}: this model clips its gradients itself: model.clip_norm"
        )
    if str(trainer.get("precision")).startswith(("16", "fp16", "transformer-engine-float16")):
        raise ConfigError(
            f"trainer.precision {trainer['precision']}: gradients would be clipped while they are "
            "scaled, and Muon never undoes the scale; use bf16-mixed"
        )
    ours = config["model"].get("class_path", DEFAULT_MODEL).startswith("lightning_tucodec.")
    if ours and str(trainer.get("precision")) not in _PRECISIONS:
        raise ConfigError(
            f"trainer.precision {trainer['precision']}: the weights of this model are float32; "
            "use 32-true or bf16-mixed"
        )
    devices = trainer.get("devices")
    if trainer.get("accelerator") == "cpu" and isinstance(devices, int) and devices > 8 * cores():
        raise ConfigError(
            f"trainer.devices {devices}: so many processes of a CPU's training on {cores()} processors "
            "only wait for one another"
        )
    if command == "fit" and trainer.get("max_epochs") == 0:
        raise ConfigError(
            "trainer.max_epochs 0: nothing would be trained; -1 leaves it to max_steps"
        )
    steps = trainer.get("max_steps")
    if command == "fit" and (steps is None or steps < 1):
        raise ConfigError(
            "trainer.max_steps: must be 1 or more, since learning rate and end depend on it; "
            "trainer.max_epochs alone does not say how long a run is"
        )
