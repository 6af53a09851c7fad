"""What names a run: the same whatever the release of Lightning, and whether or not its start still exists."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_tucodec.cli import main
from lightning_tucodec.errors import TucodecError
from lightning_tucodec.training.configuration import resolve
from lightning_tucodec.training.runs import weights
from lightning_tucodec.training.runs.identity import arguments, identity, run_id
from tests.support import MICRO
from tests.training.test_fit import RECIPES, config, runs, state, write

EXPERIMENTS = RECIPES[0].parent
RECIPES = [*RECIPES, EXPERIMENTS / "tucodecpsnr_postfilter.yaml", *EXPERIMENTS.glob("zoo/*.yaml")]

NAMES = {
    "tiny_ablation": "cf73ba37d156",
    "tiny_entropy": "fc2947305df2",
    "tiny_gan": "90d2179b9905",
    "tiny_mse": "b16ca56453cf",
    "tiny_mse_bf16": "33209031078c",
    "tiny_mse_bf16_decay": "54c8debb5bbe",
    "tiny_mse_centres": "9ea4f01461d4",
    "tiny_mse_decay": "10cda703f1f4",
    "tiny_ssim": "39d22f6a0ec9",
    "tiny_transparent": "622288499404",
    "tiny_vbr": "20134ef215f4",
    "tucodecpsnr40db": "f3fcd6b54c35",
    "tucodecpsnr_postfilter": "71bd48d419d4",
    "tucodecssim": "74f7f5dfd2d0",
    "tucodecssim_gan": "23357587a580",
    "cheng2020_anchor": "97aaa610e614",
    "cheng2020_attention": "ca48d90f335a",
    "cheng2020_checkerboard": "6607b91ddf38",
    "elic2022_chandelier": "fe7d99d55726",
    "elic2022_official": "9a5e831ebae8",
    "factorized_prior": "f200057cba94",
    "joint_autoregressive": "bc8ec10271b1",
    "joint_autoregressive_vbr": "944b674e4907",
    "mean_scale_hyperprior": "9d07ed9eb8bf",
    "mean_scale_hyperprior_gan": "6575cae7e6d0",
    "mean_scale_hyperprior_small": "a02730a6ec8d",
    "mean_scale_hyperprior_vbr": "521297b4ed1a",
    "scale_hyperprior": "8ab8c4b76b54",
    "scale_hyperprior_vbr": "b4f0cb5e09b4",
}
"""Ids on shards whose index is `{}`. A new option belongs into `identity._LATER`, so that these stay."""


@pytest.fixture(scope="module")
def resolved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The shipped recipes."""
    shards = tmp_path_factory.mktemp("shards")
    (shards / "index.json").write_text("{}")
    configs = {}
    for path in RECIPES:
        draft = yaml.safe_load(path.read_text())
        arguments(draft, "data")["shards"] = str(shards)
        configs[path.stem] = resolve(draft)
    return configs


def test_the_shipped_recipes_keep_their_names(resolved: dict[str, dict[str, Any]]) -> None:
    assert {name: run_id(values) for name, values in resolved.items()} == NAMES


def test_the_former_name_of_a_recipe_names_the_same_run(
    resolved: dict[str, dict[str, Any]],
) -> None:
    values = copy.deepcopy(resolved["tiny_mse"])
    assert arguments(values, "model")["recipe"] == "mse"
    arguments(values, "model")["recipe"] = "transparent"
    assert run_id(values) == NAMES["tiny_mse"]
    own = {**values, "model": {"class_path": "other.Model", "init_args": {"recipe": "mse"}}}
    assert identity(own)["model"]["init_args"] == {"recipe": "mse"}


def test_an_option_at_its_default_names_nothing(resolved: dict[str, dict[str, Any]]) -> None:
    """As with another release of Lightning: an option more, which may be used, and one less."""
    values = copy.deepcopy(resolved["tiny_mse"])
    values["trainer"]["a_new_option"] = None
    assert run_id(values) == NAMES["tiny_mse"]
    values["trainer"]["a_new_option"] = 3
    assert run_id(values) != NAMES["tiny_mse"]
    values["trainer"].pop("a_new_option")
    assert values["trainer"].pop("model_registry") is None
    values["run"]["a_new_option"] = True
    assert run_id(values) == NAMES["tiny_mse"]


def test_a_run_goes_on_when_its_start_is_gone(
    tmp_path: Path, shard_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also among runs that differ in nothing but their start."""
    values = config(tmp_path, shard_folder, MICRO, steps=1)
    assert main(["fit", "--config", write(tmp_path, values)]) == 0
    (start,) = runs(tmp_path)
    sources = [str(tmp_path / "a.ckpt"), str(tmp_path / "b.ckpt")]
    for source in sources:
        shutil.copy(start / "checkpoints" / "last.ckpt", source)
        values["run"].update(name="fine", init_from=source)
        values["seed_everything"] += 1  # so that b.ckpt differs
        assert main(["fit", "--config", write(tmp_path, values)]) == 0
        start = next(p for p in runs(tmp_path) if yaml.safe_load(
            (p / "config.yaml").read_text())["run"]["init_from"] == source)  # fmt: skip
    Path(sources[1]).unlink()
    capsys.readouterr()
    assert main(["fit", "--config", write(tmp_path, values)]) == 0
    assert f"run {start}: goes on at step 1" in capsys.readouterr().err
    assert len(runs(tmp_path)) == 3
    assert state(start)["tucodec"]["opt_step"] == 1
    values["run"]["name"] = "fresh"
    assert main(["fit", "--config", write(tmp_path, values)]) == 1
    assert capsys.readouterr().err == f"tucodec: {sources[1]}: No such file or directory\n"


def test_the_weights_of_a_checkpoint_name_what_starts_from_it(
    tmp_path: Path, resolved: dict[str, dict[str, Any]]
) -> None:
    """Not the bytes of the file, which differ after a resume; those of an exported model do."""
    values = copy.deepcopy(resolved["tiny_mse"])
    weights = {
        "network.a": torch.arange(6.0).reshape(2, 3),
        "network.b": torch.ones((), dtype=torch.bfloat16),
        "network.c": torch.zeros(0, 4, dtype=torch.int64),
    }

    def named(state_dict: dict[str, torch.Tensor], step: str, loops: int) -> tuple[str, bytes]:
        path = tmp_path / "start.ckpt"
        content = {
            "tucodec": {"opt_step": 1, "images_seen": 4},
            "state_dict": state_dict,
            "optimizer_states": [{"step": 1}, {step: 1}],  # one text, or two that are equal
            "loops": loops,
        }
        torch.save(content, path)
        values["run"]["init_from"] = str(path)
        return run_id(values), path.read_bytes()

    first, straight = named(weights, "step", 7)
    again, resumed = named(dict(reversed(weights.items())), "".join(["st", "ep"]), 8)
    transposed = {**weights, "network.a": weights["network.a"].t().contiguous().t()}
    assert straight != resumed
    assert first == again == named(transposed, "step", 7)[0] != NAMES["tiny_mse"]
    a = weights["network.a"]
    others = [
        {**weights, "network.a": a + torch.tensor([0, 0, 1e-6])},
        {**weights, "network.a": a.reshape(3, 2)},
        {**weights, "network.a": a.view(torch.int32)},
        {**weights, "network.d": a},
        {("network.e" if name == "network.a" else name): value for name, value in weights.items()},
    ]
    assert len({first, *(named(other, "step", 7)[0] for other in others)}) == 6

    values["run"]["init_from"] = str(tmp_path / "model.safetensors")
    files = set()
    for content in (straight, resumed):
        (tmp_path / "model.safetensors").write_bytes(content)
        files.add(run_id(values))
    assert len(files) == 2
    values["run"]["init_from"] = "/dev/zero"
    with pytest.raises(TucodecError, match="/dev/zero: not a file"):
        run_id(values)


def test_a_teacher_that_is_gone_is_remembered(
    tmp_path: Path, resolved: dict[str, dict[str, Any]]
) -> None:
    values = copy.deepcopy(resolved["tucodecpsnr_postfilter"])
    names = set()
    for number in range(2):
        teacher = tmp_path / f"{number}.safetensors"
        teacher.write_text(str(number))
        values["model"]["init_args"]["teacher"] = str(teacher)
        values["run"]["runs_dir"] = str(tmp_path)
        folder = tmp_path / f"postfilter-{run_id(values)}"
        folder.mkdir()
        names.add(folder.name)
        (folder / "config.yaml").write_text(yaml.safe_dump(values))
        (folder / "manifest.json").write_text(json.dumps({"identity": identity(values)}))
        teacher.unlink()
        assert f"postfilter-{run_id(values)}" == folder.name
    assert len(names) == 2


def test_paths_of_a_config_are_expanded_by_fit_and_by_what_looks_ahead(
    tmp_path: Path, shard_folder: Path, val_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All in the real home, none in a folder called `~`."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "shards").symlink_to(shard_folder)
    (home / "pictures").symlink_to(val_folder)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    values = config(tmp_path, shard_folder, MICRO, steps=3)
    values["data"].update(shards="~/shards", val_images="$HOME/pictures")
    values["run"].update(runs_dir="~/runs", mirror="$HOME/mirror")
    foreseen = resolve(values)
    assert main(["fit", "--config", write(tmp_path, values)]) == 0
    (folder,) = runs(home)
    assert f"test-{run_id(foreseen)}" == folder.name
    assert foreseen["run"]["runs_dir"] == str(home / "runs")
    assert len(list((folder / "images").iterdir())) == 3
    assert (home / "mirror" / folder.name / "mirror.json").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"home", "config.yaml"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("sftp://me:pass@host/a: no", "sftp://***@host/a: no"),
        ("https://h/a?token=1a2b&x=1", "https://h/a?token=***&x=1"),
        ("https://h/a?x=1&X-Amz-Signature=ff0", "https://h/a?x=1&X-Amz-Signature=***"),
        ("s3://bucket/name@2x.png a@b.c", "s3://bucket/name@2x.png a@b.c"),
    ],
)
def test_errors_show_no_credentials(text: str, shown: str) -> None:
    assert str(TucodecError(text)) == shown


def test_weights_are_read_once_as_long_as_they_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    content = weights._content_sha256
    monkeypatch.setattr(weights, "_content_sha256", lambda state: read.append(1) or content(state))
    path = tmp_path / "x.ckpt"

    def save(value: float) -> None:
        state = {"network.w": torch.full((3,), value)}
        torch.save({"state_dict": state, "tucodec": {"opt_step": 0}}, tmp_path / "new.ckpt")
        (tmp_path / "new.ckpt").replace(path)

    save(1.0)
    first = weights.weights_sha256(path)
    assert weights.weights_sha256(path) == first
    assert len(read) == 1
    save(2.0)
    assert weights.weights_sha256(path) != first
    path.unlink()
    with pytest.raises(TucodecError, match=r"x\.ckpt: No such file"):
        weights.weights_sha256(path)
