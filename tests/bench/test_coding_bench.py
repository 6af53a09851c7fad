"""The coding benches on tiny pictures: what they time is what they say."""

import json

import numpy as np
import pytest
import torch

from lightning_tucodec.bench import codec, entropy, subjects
from lightning_tucodec.coding.container import unpack
from lightning_tucodec.errors import ConfigError

ROW = {"name", "median_s", "min_s", "max_s", "ratio_to"}


@pytest.mark.parametrize("bpp", [0.15, 0.5])
def test_untrained_presets_code_information(bpp: float) -> None:
    subject = subjects.sampled("tiny", bpp, subjects.picture(256, 320))
    assert subject.bpp == pytest.approx(bpp, rel=0.15)
    assert subject.constant_channels == 0
    y, damaged = subject.model.read(unpack(subject.data))
    assert not damaged
    np.testing.assert_array_equal(y, subject.latents.y)


def test_a_rate_that_cannot_be_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"--bpp 1e\+09: tiny reaches \d"):
        subjects.sampled("tiny", 1e9, subjects.picture(8, 8))


def test_codec_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "import_seconds", lambda repeats: 0.1)
    result = codec.run(["tiny"], rates=[0.5], peers=[], size=(64, 128), repeats=1)
    rows = {row["name"]: row for row in json.loads(json.dumps(result))["rows"]}
    assert all(set(row) == ROW for row in rows.values())
    whole, alone = rows["tiny 0.5 bpp decode"], rows["tiny 0.5 bpp g_s"]
    ratio = whole["median_s"] / alone["median_s"]
    assert whole["ratio_to"]["tiny 0.5 bpp g_s"] == pytest.approx(ratio, rel=0.1)
    assert set(result["split_s"]["tiny 0.5 bpp"]["decode"]) == {
        "entropy", "coder", "g_s", "rest", "I/O",
    }  # fmt: skip
    assert "tiny 0.5 bpp decode" in codec.table_text(result)


def test_entropy_rows() -> None:
    result = entropy.run(["tiny"], rates=[0.5], peers=[], size=(48, 64), repeats=1)
    rows = {row["name"]: row for row in result["rows"]}
    growth = rows["tiny 0.5 bpp entropy decode 128x96"]["ratio_to"]
    assert list(growth) == ["tiny 0.5 bpp entropy decode 64x48"]


def test_peers_code_information() -> None:
    peer = subjects.Peer("mbt2018", 0.5, subjects.picture(128, 128))
    assert peer.constant_channels == 0
    assert 0.3 < peer.bpp < 2  # y is at 0.5; z of an untrained hyperprior comes on top
    assert peer.decompress().shape == (1, 3, 128, 128)
    # Our engine codes the same latents, at their price.
    assert (peer.exact_latents() - peer.y_hat).abs().max() < 0.01
    torch.testing.assert_close(peer.exact_decompress(), peer.decompress(), atol=0.02, rtol=0)
    assert peer.exact_bits() < 1.01  # the ends of two streams are much for so few pixels
    with torch.inference_mode():
        assert torch.equal(peer.entropy_only().decompress(), peer.x)
