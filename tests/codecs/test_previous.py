"""Files of the shipped models' predecessors still decode: these lie in `weights/previous`."""

from pathlib import Path

import numpy as np
import pytest

import lightning_tucodec as tuc
from lightning_tucodec.cli import main
from lightning_tucodec.codecs.cards import PREVIOUS, SHIPPED, models, read_card
from lightning_tucodec.io.images import read_image

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = sorted(path.stem for path in PREVIOUS.glob("*.safetensors"))


@pytest.mark.parametrize("name", NAMES)
def test_files_of_a_predecessor_show_the_same_pixels(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where only the entropy networks were trained further, the present golden picture is theirs too."""
    stream = GOLDEN / "previous" / f"{name}.tuc"
    shown = np.array(tuc.decompress(stream.read_bytes())).astype(int)
    own = stream.with_suffix(".png")
    difference = np.abs(shown - read_image(own if own.exists() else GOLDEN / f"{name}.png"))
    assert difference.max() <= 1  # another machine's sums
    assert (difference > 0).mean() <= 1e-4
    assert main(["info", str(stream)]) == 0
    assert f"{name} (previous)" in capsys.readouterr().out


def test_a_name_means_the_present_model_and_ids_are_listed() -> None:
    listed = (SHIPPED / "README.md").read_text()
    for name in NAMES:
        before, now = (
            read_card(folder / f"{name}.safetensors").id for folder in (PREVIOUS, SHIPPED)
        )
        assert before != now
        assert tuc.load(name).id == now
        assert models()[name]["id"] == now.hex()
        assert models()[name]["recipe"] in ("mse", "ssim")  # not what older files call it
        assert f"| `{name}` | {now.hex()} | {before.hex()} |" in listed
