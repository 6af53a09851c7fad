"""What would end a run hours later is said before its first step, by `fit` and by `doctor` alike."""

import json
from pathlib import Path

import pytest
from PIL import Image

from lightning_tucodec.cli import main
from lightning_tucodec.errors import ConfigError
from lightning_tucodec.quality.curve_files import read_named
from tests.support import MICRO
from tests.training.test_fit import config, write


@pytest.mark.parametrize("kind", ["small", "corrupt", "empty"])
def test_validation_images_are_looked_at_first(
    kind: str,
    tmp_path: Path,
    shard_folder: Path,
    val_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    if kind == "small":
        Image.new("RGB", (7, 7)).save(folder / "a.png")
    elif kind == "corrupt":
        data = (val_folder / "cat.png").read_bytes()
        (folder / "a.png").write_bytes(data[: len(data) // 2])
    values = config(tmp_path, shard_folder, MICRO)
    values["data"]["val_images"] = str(folder)
    path = write(tmp_path, values)
    assert main(["fit", "--config", path]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tucodec: {folder}{'' if kind == 'empty' else '/a.png'}: ")
    assert not (tmp_path / "runs").exists()
    assert main(["doctor", "--config", path]) == 1
    assert line.removeprefix("tucodec: ") in capsys.readouterr().out


def test_a_baseline_may_lie_where_its_separator_is(tmp_path: Path) -> None:
    folder = tmp_path / "exp#3"
    folder.mkdir()
    file = folder / "A#1.json"
    results = {"bpp": [0.1, 0.2, 0.4, 0.8], "psnr-rgb": [28.0, 30.0, 33.0, 36.0]}
    file.write_text(json.dumps({"name": "A", "results": results}))
    assert read_named(str(file)).name == "A"
    with pytest.raises(ConfigError, match=r"exp#3/none\.json: No such file"):
        read_named(f"{folder / 'none.json'}#jpeg")


def test_commands_expand_paths_of_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    assert main(["export", "~/run", "-o", "~/m.safetensors"]) == 1
    assert f"{tmp_path}/run: no checkpoint to export" in capsys.readouterr().err
    assert main(["wandb-sync", "~/run"]) == 1
    assert f"{tmp_path}/run: no metrics.jsonl" in capsys.readouterr().err
