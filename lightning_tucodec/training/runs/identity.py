"""Everything that decides a run's result, and the twelve digits that name it.

Trainer options in `_TRAINER` always count, with the value given there where they are not set. Model and data
options in `_LATER`, which were added later, count only where they differ from the value there. So neither a
new release of Lightning nor a new option of ours renames a run that does not use it. If the default of an
option changes, its value differs from the one here, and the run is another one.
"""

import glob
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lightning_tucodec.errors import ConfigError, TucodecError, redacted
from lightning_tucodec.io.files import expanded
from lightning_tucodec.io.storage import Storage
from lightning_tucodec.training.runs.weights import initial_weights, weights_sha256

DEFAULT_MODEL = "lightning_tucodec.training.vae.VAE"
DEFAULT_DATA = "lightning_tucodec.training.data.PatchDataModule"
"""Classes that a config without `class_path` means."""

_TRAINER: dict[str, Any] = {
    "accumulate_grad_batches": 1, "barebones": False, "benchmark": None,
    "check_val_every_n_epoch": 1, "detect_anomaly": False, "deterministic": None,
    "enable_autolog_hparams": True, "enable_checkpointing": None, "fast_dev_run": False,
    "gradient_clip_algorithm": None, "gradient_clip_val": None, "inference_mode": True,
    "limit_predict_batches": None, "limit_test_batches": None, "limit_train_batches": None,
    "limit_val_batches": None, "max_epochs": None, "max_steps": -1, "max_time": None,
    "min_epochs": None, "min_steps": None, "model_registry": None, "num_sanity_val_steps": None,
    "overfit_batches": 0.0, "precision": None, "reload_dataloaders_every_n_epochs": 0,
    "sync_batchnorm": False, "use_distributed_sampler": True, "val_check_interval": None,
}  # fmt: skip
"""Options of the trainer that are always named, and what a config without them means."""

_UNNAMED_TRAINER = {
    "accelerator", "devices", "num_nodes", "strategy", "logger", "callbacks", "default_root_dir",
    "enable_progress_bar", "enable_model_summary", "log_every_n_steps", "plugins", "profiler",
}  # fmt: skip
_RUN = ("name", "project")
"""Options of `run` that are named."""

_UNNAMED_DATA = {"shards", "val_images", "num_workers", "cache_dir", "cache_gb"}
"""Where and how a run computes, which does not decide what comes out."""

_LATER = {"muon_iterations": 5, "real_files": None, "compile": False}
"""Options of models and data that came after runs had been named, with what those runs did: unnamed there."""

_FORMER = {"recipe": {"mse": "transparent"}}
"""Values of this package's models that had another name when runs were named."""

_LOCATIONS = {
    "run": ("runs_dir", "init_from", "mirror", "baseline"),
    "data": ("shards", "val_images", "cache_dir"),
    "model": ("teacher",),
}
"""Options that hold a path or a URL."""


def arguments(config: Any, group: str) -> Any:
    """Arguments of the model or data class in a config, given with or without `class_path`."""
    values = config[group]
    return values.get("init_args") or {} if "class_path" in values else values


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """A config in which the default model and data classes are unnamed, as recipes are written."""
    groups = {"model": DEFAULT_MODEL, "data": DEFAULT_DATA}
    return {
        key: arguments(config, key)
        if key in groups and value.get("class_path") == groups[key]
        else value
        for key, value in config.items()
    }


def locations(config: Any) -> Iterator[tuple[Any, str]]:
    """Every path or URL that a config holds: the group that it stands in and its name there."""
    for group, names in _LOCATIONS.items():
        values = arguments(config, group)
        for name in names:
            if isinstance(values.get(name), str):
                yield values, name


def expand_locations(config: Any) -> None:
    """Replace `~` and `$NAME` in every path or URL of a config, in place."""
    for values, name in locations(config):
        values[name] = expanded(values[name])


def identity(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a resolved config that decides the result.

    Paths, devices, nodes, workers and logging are left out; in their place stand the SHA-256 of the
    shard index, of the initial weights and of a teacher (`weights_sha256`). The default classes go unnamed.

    A run that has begun needs its initial weights no more: where they are gone, their hash is taken from
    the manifest of the run that began with them.

    Args:
        config: resolved config of `fit` with the groups run, model, data and trainer.

    Raises:
        ConfigError: the shard index cannot be read; weights cannot, and no run has begun with them.
        UnknownModelError: the same of a model's name.
    """
    hashes: dict[str, str | None] = {}
    gone: dict[str, TucodecError] = {}
    for name, source in _sources(config).items():
        try:
            hashes[name] = weights_sha256(initial_weights(source)) if source else None
        except TucodecError as error:
            gone[name] = error
    data = arguments(config, "data")
    index = _index_sha256(data["shards"]) if "shards" in data else None
    if gone:
        hashes |= _remembered(config, hashes, index, gone)
    return _identity(config, hashes, index)


def _sources(config: dict[str, Any]) -> dict[str, str | None]:
    """Weights that decide the result, by the place where they are named."""
    sources = {"init_from": config["run"].get("init_from")}
    model = arguments(config, "model")
    return {**sources, "teacher": model["teacher"]} if "teacher" in model else sources


def _identity(
    config: dict[str, Any], hashes: dict[str, str | None], index: str | None
) -> dict[str, Any]:
    config = flat(config)

    def group(name: str, unnamed: set[str], more: dict[str, Any]) -> dict[str, Any]:
        values = {
            key: value
            for key, value in arguments(config, name).items()
            if key not in unnamed and (key not in _LATER or value != _LATER[key])
        } | more
        own = config[name]
        if own.get("class_path", DEFAULT_MODEL).startswith("lightning_tucodec."):
            for key, former in _FORMER.items():
                if key in values:
                    values[key] = former.get(values[key], values[key])
        return {**own, "init_args": values} if "class_path" in own else values

    trainer = {
        key: value
        for key, value in config["trainer"].items()
        if key not in _UNNAMED_TRAINER and (key in _TRAINER or value != trainer_default(key))
    }
    return {
        "model": group("model", set(), {k: v for k, v in hashes.items() if k == "teacher"}),
        "data": group("data", _UNNAMED_DATA, {"index_sha256": index}),
        "trainer": {**_TRAINER, **trainer},
        "run": {
            **{name: config["run"].get(name) for name in _RUN},
            "init_from_sha256": hashes["init_from"],
        },
        "seed": config.get("seed_everything"),
    }


def trainer_default(option: str) -> Any:
    """What an option of the trainer that is not in `_TRAINER` does by default in this release."""
    import inspect

    from pytorch_lightning import Trainer

    parameter = inspect.signature(Trainer.__init__).parameters.get(option)
    return None if parameter is None else parameter.default


def _remembered(
    config: dict[str, Any],
    hashes: dict[str, str | None],
    index: str | None,
    gone: dict[str, TucodecError],
) -> dict[str, str | None]:
    """Hashes of weights that are gone, from the one run that this config has begun with them.

    Raises:
        TucodecError: there is no such run, or several.
    """
    run, sources, found = config["run"], _sources(config), {}
    for folder in sorted(Path(run["runs_dir"]).glob(f"{glob.escape(run['name'])}-*")):
        try:
            theirs = yaml.safe_load((folder / "config.yaml").read_bytes())
            begun = json.loads((folder / "manifest.json").read_bytes())["identity"]
            named, model = _sources(theirs), arguments(begun, "model")
            known = {"init_from": begun["run"]["init_from_sha256"], "teacher": model.get("teacher")}
        except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError, AttributeError):
            continue  # another kind of folder
        known = {name: known[name] for name in gone}
        same = all(named.get(name) == redacted(str(sources[name])) for name in gone)
        if same and plain(_identity(config, {**hashes, **known}, index)) == begun:
            found[folder] = known
    if len(found) != 1:
        (_, error), *_ = gone.items()
        if found:
            names = ", ".join(map(str, found))
            raise ConfigError(f"{error}; several runs began with it ({names})")
        raise error
    return next(iter(found.values()))


def run_id(config: dict[str, Any]) -> str:
    """Twelve hexadecimal digits that name the run."""
    return digest(identity(config))


def plain(value: dict[str, Any]) -> dict[str, Any]:
    """An identity as a manifest holds it."""
    result: dict[str, Any] = without_credentials(json.loads(json.dumps(value, default=str)))
    return result


def without_credentials(value: Any) -> Any:
    """A copy of a configuration in which every text is `redacted`."""
    if isinstance(value, dict):
        return {key: without_credentials(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_credentials(inner) for inner in value]
    return redacted(value) if isinstance(value, str) else value


def digest(value: dict[str, Any]) -> str:
    """Of an identity, the run id."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _index_sha256(shards: str) -> str:
    """SHA-256 of the index of shards in a folder or at a URL."""
    storage = Storage(shards)
    try:
        return hashlib.sha256(storage.read("index.json")).hexdigest()
    except OSError as error:
        raise ConfigError(f"{storage.path('index.json')}: {error.strerror or error}") from None
