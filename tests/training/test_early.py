"""What would end a run hours later is said before its first step, by `fit` and by `doctor` alike."""

from pathlib import Path

import pytest
from PIL import Image

from lightning_tucodec.cli import main
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
