"""The post-filter's recipe: trains, goes on where it stopped, exports the averaged weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from skimage.data import astronaut

from data_pipelines.precode_vvc import PrecodeOptions, precode
from lightning_tucodec.cli import main
from lightning_tucodec.codecs.h266.codec import H266
from lightning_tucodec.codecs.h266.postfilter import FilterModel
from lightning_tucodec.codecs.library import load_filter
from lightning_tucodec.errors import ConfigError
from lightning_tucodec.training.input.shards import ShardReader
from lightning_tucodec.training.postfilter import PostFilterModule
from lightning_tucodec.training.runs.identity import run_id
from lightning_tucodec.training.runs.tracking import read_metrics
from lightning_tucodec.training.runs.weights import network_weights
from tests.training.test_nonfinite import spoilt
from tests.training.test_validation import assert_measured_once, fit_on

RECIPE = Path(__file__).parents[2] / "experiments" / "tucodecpsnr_postfilter.yaml"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    (folder / "photos").mkdir()
    Image.fromarray(astronaut()[40:137, 150:247]).save(folder / "photos" / "one.png")
    options = PrecodeOptions(
        ("vvc:qp=40,preset=faster,colour=orthonormal",), per_photo=1, patch=32, shard_size=5
    )
    precode([str(folder / "photos")], str(folder / "out"), options)
    return folder / "out"


def words(folder: Path, shards: Path, steps: int) -> list[str]:
    folder.mkdir(exist_ok=True)
    values = yaml.safe_load(RECIPE.read_text())
    values["run"].update(runs_dir=str(folder / "runs"))
    values["model"]["init_args"].update(
        network={"channels": 8, "blocks": 1}, warmup_steps=2, lr=5e-3
    )
    values["data"]["init_args"].update(
        shards=str(shards), val_images=str(shards), batch_size=4, crop=32
    )
    values["trainer"].update(max_steps=60, val_check_interval=20, log_every_n_steps=10)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return ["fit", "--config", str(path), "--trainer.max_steps", str(steps)]


def metrics(folder: Path, name: str) -> list[float]:
    (run,) = (folder / "runs").iterdir()
    return [row[name] for row in read_metrics(run / "metrics.jsonl") if name in row]


def test_it_learns_and_exports(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(words(tmp_path / "run", shards, 60)) == 0
    (folder,) = (tmp_path / "run" / "runs").iterdir()
    content = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    gains = metrics(tmp_path / "run", "val/gain")
    assert len(gains) == 3
    assert gains[-1] > max(0.01, gains[0])
    file = tmp_path / "models" / "mine.safetensors"
    assert main(["export", str(folder), "-o", str(file)]) == 0
    monkeypatch.setenv("TUCODEC_MODELS", str(tmp_path / "models"))
    model = H266(40, filter="mine").model()
    assert model is not None
    assert model.card["validation"]["gain"] == round(gains[-1], 4)
    for name, value in network_weights(content).items():
        exported = model.network.state_dict()[name]
        assert np.allclose(exported, value, rtol=1e-3, atol=1e-6), name

    doubled = folder / "checkpoints" / "doubled.ckpt"
    for name in content["state_dict"]:
        content["state_dict"][name] *= 2
    torch.save(content, doubled)
    runs = [str(file), str(doubled)]
    call = ["export", *runs, "--average", "0.25", "0.75", "-o"]
    assert main([*call, str(file), "--force"]) == 1  # an input
    assert main([*call, str(tmp_path / "average.safetensors")]) == 0
    average = load_filter(str(tmp_path / "average.safetensors"))
    assert average.card["average"] == [["mine.safetensors", 0.25], ["doubled.ckpt", 0.75]]
    for name, value in model.network.state_dict().items():
        exported = average.network.state_dict()[name]
        assert np.allclose(exported, 1.75 * value, rtol=2e-3, atol=2e-6), name


def test_weights_that_a_validation_finds_broken(
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The average that a validation measures; no training step reads it. The validation stays owed."""
    command = words(tmp_path / "run", shards, 20)
    measure = PostFilterModule.validation_step

    def spoil(self: PostFilterModule, batch: dict[str, Any], number: int) -> None:
        with spoilt(self.averaged, "tail."):
            measure(self, batch, number)

    with monkeypatch.context() as patch:
        patch.setattr(PostFilterModule, "validation_step", spoil)
        assert main(command) == 1
    (folder,) = (tmp_path / "run" / "runs").iterdir()
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert "of validation image 0 is not finite at optimiser step 20" in told.splitlines()[-1]
    assert not metrics(tmp_path / "run", "val/gain")
    assert (folder / "checkpoints" / "nonfinite-20.ckpt").is_file()
    assert main(command) == 0
    assert len(metrics(tmp_path / "run", "val/gain")) == 1


@pytest.mark.parametrize(
    ("shares", "channels", "what"),
    [
        (["0.5", "0.6"], 8, "2 numbers with sum 1"),
        (["1"], 8, "2 numbers with sum 1"),
        (["0.5", "0.5"], 16, "its network differs"),
    ],
)
def test_what_cannot_be_averaged(
    shares: list[str], channels: int, what: str,
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name, width in (("one", channels), ("two", 8)):
        module = PostFilterModule(network={"channels": width, "blocks": 1})
        described = {"opt_step": 0, **module.describe()}
        content = {"state_dict": module.state_dict(), "tucodec": described}
        torch.save(content, tmp_path / f"{name}.ckpt")
    runs = [str(tmp_path / "one.ckpt"), str(tmp_path / "two.ckpt")]
    out = tmp_path / "average.safetensors"
    assert main(["export", *runs, "-o", str(out), "--average", *shares]) == 1
    assert what in capsys.readouterr().err
    assert not out.exists()


def test_a_larger_network_goes_on_from_a_smaller_one(tmp_path: Path) -> None:
    small = PostFilterModule(network={"channels": 8, "blocks": 1, "corrections": 1})
    for parameter in small.averaged.parameters():
        torch.nn.init.normal_(parameter)
    torch.save(
        {"tucodec": {"opt_step": 1}, "state_dict": small.state_dict()}, tmp_path / "small.ckpt"
    )
    large = PostFilterModule(network={"channels": 8, "blocks": 2, "corrections": 3})
    fresh = {name: value.clone() for name, value in large.network.state_dict().items()}
    large.warm_start(str(tmp_path / "small.ckpt"))
    known = small.averaged.state_dict()
    for network in (large.network, large.averaged):
        for name, value in network.state_dict().items():
            given = known.get(name, value[:0])
            assert torch.equal(value[: len(given)], given), name
            assert torch.equal(value[len(given) :], fresh[name][len(given) :]), name


def test_another_network_is_no_start(tmp_path: Path) -> None:
    wide = PostFilterModule(network={"channels": 16, "blocks": 1})
    torch.save(
        {"tucodec": {"opt_step": 1}, "state_dict": wide.state_dict()}, tmp_path / "wide.ckpt"
    )
    torch.save({"tucodec": {"opt_step": 1}, "state_dict": {}}, tmp_path / "none.ckpt")
    for name in ("wide.ckpt", "none.ckpt"):
        with pytest.raises(ConfigError, match=name):
            PostFilterModule(network={"channels": 8, "blocks": 1}).warm_start(str(tmp_path / name))


def test_a_teacher_leaves_the_library_where_it_is() -> None:
    """On a GPU the network would go there, and the next picture of H.266 would not be decoded."""
    module = PostFilterModule(network={"channels": 8, "blocks": 1}, teacher="vvc-postfilter")
    assert module.teacher is not None
    module.teacher.network.to("meta")
    assert next(load_filter("vvc-postfilter").network.parameters()).device.type == "cpu"


def test_a_teacher_is_learned_from(shards: Path, tmp_path: Path) -> None:
    # Who is the teacher has nothing to learn from it, and of what lies between it and the original as much
    # as the squared distance is.
    network = {"channels": 8, "blocks": 1, "mirrored": False}
    teacher = PostFilterModule(network=network).averaged
    torch.nn.init.normal_(teacher.tail.weight)
    file = str(tmp_path / "teacher.safetensors")
    FilterModel.freeze(teacher, "teacher", {}).file.save(Path(file))
    options = ["--model.network", str(network).replace("False", "false"), "--model.lr", "1e-12"]
    options += ["--run.init_from", file, "--model.teacher", file, "--model.teacher_share"]
    for share in ("0", "0.5", "1"):
        assert main([*words(tmp_path / share, shards, 10), *options, share]) == 0
    (alone,), (between,), (taught,) = (
        metrics(tmp_path / share, "train/loss") for share in ("0", "0.5", "1")
    )
    assert alone > 0.8
    assert taught < 0.1  # What is added to all errors, over the plain conversion's.
    assert between == pytest.approx(taught + (alone - taught) / 4, rel=0.02)


@pytest.mark.parametrize(
    ("option", "what"),
    [
        (["--model.teacher", "nobody"], "nobody"),
        (["--model.teacher_share", "1.5"], "must lie between 0 and 1"),
    ],
)
def test_no_such_teacher(
    option: list[str], what: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words(tmp_path / "run", shards, 60), *option]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert what in line
    assert not (tmp_path / "run" / "runs").exists()


def test_a_teacher_decides_and_not_where_it_lies(tmp_path: Path) -> None:
    names = ("one", "copy", "other")
    for name, content in zip(names, (b"1", b"1", b"2"), strict=True):
        (tmp_path / f"{name}.safetensors").write_bytes(content)

    def of(teacher: str | None) -> str:
        model = {"class_path": "a.PostFilterModule", "init_args": {"teacher": teacher}}
        return run_id({"model": model, "data": {}, "trainer": {}, "run": {}})

    one, copy, other = (of(str(tmp_path / f"{name}.safetensors")) for name in names)
    assert one == copy
    assert len({one, other, of("vvc-postfilter"), of(None)}) == 4


def test_two_processes_measure_every_patch_once(shards: Path, tmp_path: Path) -> None:
    options = ["--trainer.val_check_interval", "1"]
    fit_on(2, [*words(tmp_path / "run", shards, 1), *options])
    (folder,) = (tmp_path / "run" / "runs").iterdir()
    assert_measured_once(folder, len(ShardReader(str(shards))))


def test_a_run_folder_is_a_warm_start(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it is for a codec: its newest checkpoint, of which the average is taken."""
    assert main(words(tmp_path / "first", shards, 3)) == 0
    (first,) = (tmp_path / "first" / "runs").iterdir()
    command = words(tmp_path / "second", shards, 1)
    assert main([*command, "--run.init_from", str(first), "--model.lr", "0"]) == 0
    (second,) = (tmp_path / "second" / "runs").iterdir()
    weights = [
        network_weights(torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True))
        for folder in (first, second)
    ]
    for name, value in weights[0].items():
        assert torch.equal(weights[1][name], value), name
    empty = tmp_path / "empty"
    empty.mkdir()
    capsys.readouterr()
    assert main([*command, "--run.init_from", str(empty)]) == 1
    assert f"{empty}/checkpoints/last.ckpt" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("damage", ["a byte", "cut", "no index", "another kind"])
def test_precoded_validation_is_read_before_the_first_step(
    damage: str,
    shards: Path,
    shard_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    held_out = tmp_path / "held_out"
    shutil.copytree(shard_folder if damage == "another kind" else shards, held_out)
    tar = min(held_out.glob("*.tar"))
    if damage == "a byte":
        content = bytearray(tar.read_bytes())
        content[2000] ^= 1
        tar.write_bytes(content)
    elif damage == "cut":
        tar.write_bytes(tar.read_bytes()[:-512])
    elif damage == "no index":
        (held_out / "index.json").unlink()
    command = words(tmp_path / "run", shards, 1)
    place = ["--data.init_args.val_images", str(held_out)]
    assert main([*command, *place]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tucodec: {held_out}")
    assert not (tmp_path / "run" / "runs").exists()
    path = Path(command[2])
    values = yaml.safe_load(path.read_text())
    values["data"]["init_args"]["val_images"] = str(held_out)
    path.write_text(yaml.safe_dump(values))
    assert main(["doctor", "--json", "--config", str(path)]) == 1
    failing = [f for f in json.loads(capsys.readouterr().out) if f["level"] == "fail"]
    assert [(f["name"], f["text"]) for f in failing] == [
        ("validation", line.removeprefix("tucodec: "))
    ]
