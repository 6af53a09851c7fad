"""Where the time of a codec goes, by processor seconds."""

import json
from pathlib import Path

import pytest
from PIL import Image

from lightning_tucodec import cli
from tests.support import photo


def test_the_parts_of_the_post_filter_add_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(photo("chelsea.png", 96, 80)).save(tmp_path / "a.png")
    tuned = "vvc+postfilter:qp=40,preset=fast,chroma_qp_offset=-4"
    words = ["bench", "parts", str(tmp_path / "a.png"), "--codec", tuned, "jpeg:q=30"]
    assert cli.main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    filtered, jpeg = result["rows"]
    assert list(filtered["decode"]["parts"]) == ["H.266 decoder", "filter: picture"]
    encode = filtered["encode"]
    named = {"H.266 encoder", "H.266 encoder, preset faster", "filter: weights and picture"}
    assert named <= set(encode["parts"])
    for side in (encode, filtered["decode"]):
        assert 0 < sum(side["parts"].values()) <= side["processor_s"] + 0.05
    assert encode["processor_s_per_megapixel"] == pytest.approx(
        encode["processor_s"] / 0.00768, rel=0.01
    )
    assert jpeg["encode"]["parts"] == {}
