"""experiments/gpu_hour on the CPU: the pack, the plan, and two steps in one piece or in two."""

import importlib.util
import json
import resource
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from lightning_tucodec.codecs.library import load
from lightning_tucodec.errors import ConfigError, DatasetError
from lightning_tucodec.training.input.batches import RankBatches
from lightning_tucodec.training.input.resident import (
    ResidentDataModule,
    _Memory,
    crops,
    pack,
    unpack,
)
from lightning_tucodec.training.input.shards import ShardReader
from lightning_tucodec.training.runs.weights import load_checkpoint

HOUR = Path(__file__).parents[2] / "experiments" / "gpu_hour" / "hour.py"


@pytest.fixture(scope="module")
def hour() -> ModuleType:
    specification = importlib.util.spec_from_file_location("hour", HOUR)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def packed(shard_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pack") / "crops.pack"
    found = pack([str(shard_folder)], out)
    assert found.patches == 12
    assert found.bytes == out.stat().st_size
    assert found.psnr > 38
    return out


def test_a_pack_keeps_to_its_limit(shard_folder: Path, packed: Path, tmp_path: Path) -> None:
    limit = packed.stat().st_size // 2 + 4096
    found = pack([str(shard_folder)], tmp_path / "half.pack", limit)
    assert 3 <= found.patches < 12
    assert found.bytes <= limit
    # The same draw: a smaller pack is the beginning of a larger one.
    assert np.array_equal(unpack(tmp_path / "half.pack"), unpack(packed)[: found.patches])
    with pytest.raises(ConfigError, match="no patch fits into 5000 bytes"):
        pack([str(shard_folder)], tmp_path / "none.pack", 5000)
    (tmp_path / "bad.pack").write_bytes(packed.read_bytes()[:-100])
    for path in (tmp_path / "bad.pack", tmp_path / "missing.pack"):
        with pytest.raises(DatasetError, match="no pack of patches"):
            unpack(path)


def test_patches_are_those_of_the_shards(shard_folder: Path, packed: Path) -> None:
    reader = ShardReader(str(shard_folder))
    originals = np.stack([reader.pixels(number) for number in range(12)]).astype(int)
    for patch in unpack(packed).astype(int):
        errors = np.square(originals - patch).mean((1, 2, 3))
        assert errors.min() < 12
        assert (errors < 12).sum() == 1


def test_crops_on_the_device_are_those_of_the_host(packed: Path) -> None:
    """Forty bytes a sample go over the bus; the pixels are those that `RankBatches` cuts out."""
    data = ResidentDataModule(str(packed), 8, crop=32, seed=3)
    loader = data.train_dataloader()
    host = RankBatches(_Memory(unpack(packed)), loader.batches.plan, 8, 32, True)  # type: ignore[arg-type]
    assert {flip for *_, flip in host.places(0)} == {False, True}
    pixels = np.empty(host.shape, np.uint8)
    for start, sent in zip((0, 8), loader, strict=False):
        host.read(start, pixels)
        assert sum(value.nbytes for value in sent.values()) == 8 * 40
        assert torch.equal(
            crops(torch.from_numpy(unpack(packed)), sent["place"], 32), torch.from_numpy(pixels)
        )
        batch = data.on_after_batch_transfer(sent, 0)
        assert set(batch) == {"image", "index"}
        assert np.array_equal((batch["image"] * 255).round().byte().permute(0, 2, 3, 1), pixels)


def test_plan_says_what_fits(hour: ModuleType, packed: Path, micro: dict[str, Any]) -> None:
    plan = hour.make_plan("tiny", 0.5, packed, "cpu", batch=2, crop=32, network=micro)
    assert plan["steps"] == pytest.approx(30 * hour.SHARE / plan["step_s"], rel=0.02)
    assert plan["expected_minutes"] == pytest.approx(0.5 * hour.SHARE, rel=0.05)
    assert plan["flop"] == plan["flop_per_step"] * plan["steps"] > 0
    assert plan["images"] == 2 * plan["steps"]
    assert 0 < plan["share_of_matmul_peak"] < 1


def test_two_steps_in_one_piece_or_in_two(
    hour: ModuleType,
    packed: Path,
    micro: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hour, "LOG_STEPS", 1)
    plan = {"preset": "tiny", "lmbda": 512.0, "steps": 2, "batch": 2, "crop": 32,
            "precision": "32-true", "device": "cpu"}  # fmt: skip
    straight, pieces = tmp_path / "straight", tmp_path / "pieces"
    for folder in (straight, pieces):
        folder.mkdir()
        (folder / "plan.json").write_text(json.dumps(plan))
    assert hour.train(straight, packed, 5.0, "cpu", micro)
    assert not hour.train(pieces, packed, 0.0, "cpu", micro)  # ends after the first step
    assert load_checkpoint(pieces / "last.ckpt")["tucodec"]["opt_step"] == 1
    assert hour.train(pieces, packed, 0.0, "cpu", micro)
    one, two = (load_checkpoint(folder / "last.ckpt") for folder in (straight, pieces))
    for name, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][name]), name
    assert two["tucodec"]["images_seen"] == 4
    rows = [json.loads(line) for line in (pieces / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["train/loss"] > 0 for row in rows)
    model = load(pieces / "hour-tiny-512.safetensors")
    assert model.card["opt_step"] == 2
    before = (pieces / "last.ckpt").stat().st_mtime_ns
    assert hour.train(pieces, packed, 5.0, "cpu", micro)  # nothing is left to do
    assert (pieces / "last.ckpt").stat().st_mtime_ns == before
    # Cut off between the last save and the model.
    content = (pieces / "hour-tiny-512.safetensors").read_bytes()
    (pieces / "hour-tiny-512.safetensors").unlink()
    assert hour.train(pieces, packed, 5.0, "cpu", micro)
    assert (pieces / "hour-tiny-512.safetensors").read_bytes() == content


def test_a_full_disk_is_told_in_a_line(
    hour: ModuleType, packed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "hour" / "tiny"
    folder.mkdir(parents=True)
    plan = {"preset": "tiny", "lmbda": 512.0, "steps": 1, "batch": 1, "crop": 32,
            "precision": "32-true", "device": "cpu"}  # fmt: skip
    (folder / "plan.json").write_text(json.dumps(plan))
    words = [
        "train",
        "tiny",
        "--device",
        "cpu",
        "--crops",
        str(packed),
        "--out",
        str(folder.parent),
    ]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        assert hour.main(words) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith(f"hour.py: {folder / 'last.ckpt'}: not saved (")
    assert [path.name for path in folder.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    "words",
    ["pack {} --limit-mb nan", "plan tiny --minutes nan", "plan tiny --minutes 0", "train tiny --minutes -1",
     "plan tiny --batch 0", "plan tiny --crop -8", "plan tiny --lmbda nan"],
)  # fmt: skip
def test_values_that_mean_nothing_are_usage_errors(hour: ModuleType, words: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        hour.main(words.format("shards").split())


def test_what_is_no_plan_and_no_file(
    hour: ModuleType, shard_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hour.main(["pack", str(shard_folder), "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"hour.py: {tmp_path}: Is a directory\n"
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "plan.json").write_text('{"steps": 5}')
    assert hour.main(["train", "tiny", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "no plan ('preset')" in capsys.readouterr().err


def test_a_folder_that_cannot_be_is_told_before_the_measurement(
    hour: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hour, "make_plan", None)
    (tmp_path / "hour").touch()
    assert hour.main(["plan", "tiny", "--device", "cpu", "--out", str(tmp_path / "hour")]) == 1
    assert "hour: is no folder" in capsys.readouterr().err


def test_commands(
    hour: ModuleType, packed: Path, tmp_path: Path, shard_folder: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert hour.main(["pack", str(shard_folder)]) == 0
    assert "crops.pack: 12 patches" in capsys.readouterr().out
    assert hour.main(["train", "tiny", "--device", "cpu"]) == 1
    assert "`hour.py plan` makes one" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert hour.main(["plan", "fast"]) == 1
        assert "no CUDA GPU here" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "hour", ignore_errors=True)
    (tmp_path / "hour" / "tiny").mkdir(parents=True)
    (tmp_path / "hour" / "tiny" / "last.ckpt").touch()
    assert hour.main(["plan", "tiny", "--device", "cpu"]) == 1
    assert "has begun with another plan" in capsys.readouterr().err
