import contextlib
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import lightning_tucodec as tuc
from lightning_tucodec.codecs import library
from lightning_tucodec.codecs.learned import latents as layout
from lightning_tucodec.codecs.learned import transforms as room
from lightning_tucodec.codecs.learned.codec import TucModel
from lightning_tucodec.codecs.learned.latents import own_modes, strip_bounds
from lightning_tucodec.codecs.learned.model_file import ModelFile, freeze, shapes_only
from lightning_tucodec.coding.container import pack, unpack
from lightning_tucodec.coding.integer_weights import integer_layout, quantise_network
from lightning_tucodec.nn.codec import TucodecVAE
from lightning_tucodec.quality.metrics import pixels_ms_ssim
from lightning_tucodec.training.vae import resolve_codec
from tests.support import CALLER_MODES, MICRO, caller_mode, photo


@pytest.fixture(scope="module")
def model() -> TucModel:
    torch.manual_seed(0)
    return TucModel(
        freeze(TucodecVAE(resolve_codec("tiny", MICRO)), "micro", {"note": "untrained"})
    )


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (17, 35), (75, 101), (8, 300)])
def test_decoded_pixels_are_the_encoders(model: TucModel, size: tuple[int, int]) -> None:
    pixels = np.ascontiguousarray(photo("chelsea.png", 300, 101)[: size[0], : size[1]])
    coded = model.code(pixels)
    shown = model.decode(coded.data)
    assert shown.shape == pixels.shape
    np.testing.assert_array_equal(shown, model.synthesise(coded.latents.y, size[1], size[0]))


def test_companded_centres_are_coded(tmp_path: Path) -> None:
    """Learned gaps go through the exported file into the integer tables."""
    torch.manual_seed(0)
    network = TucodecVAE(resolve_codec("tiny", {**MICRO, "quantizer": "companded"}))
    raw = network.quantizer.raw_gaps
    assert isinstance(raw, torch.nn.Parameter)
    with torch.no_grad():
        raw.add_(torch.linspace(-1, 1, len(raw)).abs())
    freeze(network, "companded", {}).save(tmp_path / "companded.safetensors")
    model = TucModel(ModelFile.load(tmp_path / "companded.safetensors"))
    pixels = photo("chelsea.png", 256, 192)
    coded = model.code(pixels)
    shown = model.decode(coded.data)
    np.testing.assert_array_equal(shown, model.synthesise(coded.latents.y, 256, 192))
    assert -1 < len(coded.data) - model.bits_of(coded.latents) / 8 < 40  # with the header
    centres = model.network.quantizer.centres().detach()
    assert torch.equal(centres, network.quantizer.centres().detach())
    assert float(centres.diff().max()) > 1.3


def test_file_size_is_close_to_the_estimate(model: TucModel) -> None:
    pixels = photo("chelsea.png", 256, 192)
    bits = 8 * len(model.encode(pixels))
    assert bits <= 1.01 * model.estimated_bits(pixels) + 8 * 32


def test_strips_restart_and_cover_the_image(
    model: TucModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "STRIP_POSITIONS", 40)
    assert strip_bounds(13, 7) == [(0, 4), (4, 8), (8, 12), (12, 13)]
    monkeypatch.setattr(layout, "STRIP_POSITIONS", 8192)
    assert [len(strip_bounds(*size)) for size in ((32, 48), (64, 48), (64, 49), (64, 96))] == [
        1,
        1,
        2,
        2,
    ]
    assert strip_bounds(66, 96) == [(0, 36), (36, 66)]
    monkeypatch.setattr(layout, "STRIP_POSITIONS", 40)
    pixels = photo("chelsea.png", 101, 180)
    coded = model.code(pixels)
    assert len(coded.latents.z) == 3
    np.testing.assert_array_equal(
        model.decode(coded.data), model.synthesise(coded.latents.y, 101, 180)
    )


def test_strips_side_by_side_are_the_same_strips(
    model: TucModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "STRIP_POSITIONS", 40)
    latents = model.analyse(photo("chelsea.png", 101, 300))
    data = model.write(latents, 101, 300)
    strips = strips_of(data)
    assert len(strips) == 5
    broken = pack(dataclasses.replace(unpack(data), strips=(*strips[:2], b"", strips[3][:5], b"")))
    lost = model.read(unpack(broken), salvage=True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert model.write(latents, 101, 300) == data
    np.testing.assert_array_equal(model.read(unpack(data))[0], latents.y)
    also_lost = model.read(unpack(broken), salvage=True)
    assert lost[1] == also_lost[1] == [2, 3, 4]
    np.testing.assert_array_equal(lost[0], also_lost[0])
    with pytest.raises(tuc.CorruptStreamError):
        model.read(unpack(broken))


def test_large_images_are_coded_in_tiles_without_seams(
    model: TucModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = photo("chelsea.png", 16 * 70 - 3, 1000)
    whole = model.analyse(pixels)
    shown = model.synthesise(whole.y, *pixels.shape[1::-1])
    monkeypatch.setattr(room, "WHOLE_POSITIONS", 100)
    monkeypatch.setattr(room, "TILE_MEMORY", 0)
    cut = model.analyse(pixels)
    assert (cut.y != whole.y).mean() < 1e-4
    difference = np.abs(model.synthesise(whole.y, *pixels.shape[1::-1]).astype(int) - shown)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-4


def strips_of(data: bytes) -> list[bytes]:
    return [strip for strip in unpack(data).strips if strip is not None]


@pytest.mark.parametrize("damage", ["payload", "checksum"])
def test_salvage_shows_the_sound_strips_and_marks_the_others(
    model: TucModel, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(layout, "STRIP_POSITIONS", 40 * 4)
    pixels = photo("chelsea.png", 101, 2000)  # 7×125 positions: strips of 20 rows
    data = model.encode(pixels)
    whole = model.decode(data)
    strips = strips_of(data)
    assert len(strips) == 7
    if damage == "payload":  # under a valid checksum
        broken = dataclasses.replace(unpack(data), strips=(*strips[:3], strips[3][:9], *strips[4:]))
        data = pack(broken)
    else:
        at = len(data) - sum(len(strip) + 4 for strip in strips[3:]) + 5
        data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    with pytest.raises(tuc.CorruptStreamError):
        model.decode(data)
    decoded = model.salvage(unpack(data, salvage=True))
    assert decoded.damaged == [(16 * 60, 16 * 80)]
    assert set(np.unique(decoded.pixels[960:1280])) == {0, 255}
    reach = 16 * (model._halo_synthesis.before + model._halo_synthesis.after)
    assert reach < 900
    np.testing.assert_array_equal(decoded.pixels[: 960 - reach], whole[: 960 - reach])
    np.testing.assert_array_equal(decoded.pixels[1280 + reach :], whole[1280 + reach :])


def test_nothing_to_salvage_is_an_error(model: TucModel) -> None:
    data = model.encode(photo("chelsea.png", 32, 32))
    with pytest.raises(tuc.CorruptStreamError, match="nothing can be salvaged"):
        model.salvage(unpack(data[:-1], salvage=True))


def test_flags_that_nobody_writes_are_refused(model: TucModel) -> None:
    container = unpack(model.encode(photo("chelsea.png", 32, 32)))
    assert container.flags == 0
    for flags in (1, 2, 4, 8):
        with pytest.raises(tuc.UnsupportedVersionError, match="flags"):
            model.decode(pack(dataclasses.replace(container, flags=flags)))


def test_input_kinds_of_the_python_api(model: TucModel) -> None:
    pixels = photo("chelsea.png", 40, 33)
    streams = {
        model.compress(pixels),
        model.compress(Image.fromarray(pixels)),
        model.compress(torch.from_numpy(pixels)),
    }
    assert len(streams) == 1
    assert model.decompress(streams.pop()).size == (40, 33)
    for bad in (pixels.astype(np.float32), pixels[..., 0], "photo.png"):
        with pytest.raises(TypeError):
            model.compress(bad)  # type: ignore[arg-type]


def test_model_file_round_trip(model: TucModel, tmp_path: Path) -> None:
    path = tmp_path / "micro.safetensors"
    model.file.save(path)
    loaded = TucModel(ModelFile.load(path))
    assert loaded.id == model.id
    assert loaded.card == {"note": "untrained"}
    pixels = photo("coffee.png", 64, 48)
    assert loaded.encode(pixels) == model.encode(pixels)


def test_id_follows_weights_not_the_card(model: TucModel) -> None:
    renamed = ModelFile("other", model.file.config, model.file.tensors, {"note": "edited"})
    assert renamed.id == model.id
    changed = dict(model.file.tensors)
    changed["medians"] = changed["medians"] + 1
    assert ModelFile("micro", model.file.config, changed, {}).id != model.id


def test_damaged_model_files_are_named(model: TucModel, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    with pytest.raises(tuc.ModelFileError, match=r"bad\.safetensors"):
        ModelFile.load(path)
    path.write_bytes(b"not a model")
    with pytest.raises(tuc.ModelFileError, match=r"bad\.safetensors"):
        ModelFile.load(path)
    model.file.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(tuc.ModelFileError, match=r"bad\.safetensors"):
        ModelFile.load(path)


def test_a_stream_of_another_model_is_refused(model: TucModel) -> None:
    data = tuc.untrained("tiny", seed=5).compress(photo("coffee.png", 32, 32))
    with pytest.raises(tuc.UnknownModelError):
        model.decompress(data)
    with pytest.raises(tuc.UnknownModelError):
        tuc.decompress(data)


def test_shipped_models_say_how_long_they_were_trained() -> None:
    cards = tuc.models().values()
    assert cards
    assert all(card["opt_step"] > 0 for card in cards)


def test_coding_imports_no_training_library() -> None:
    code = (
        "import sys, numpy as np, lightning_tucodec as tuc\n"
        "model = tuc.untrained('tiny')\n"
        "model.decompress(model.compress(np.zeros((16, 16, 3), np.uint8)))\n"
        "bad = {'pytorch_lightning', 'wandb', 'webdataset', 'compressai', 'torchmetrics'}\n"
        "print(sorted(bad & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"


def test_listing_models_does_not_import_a_compiler() -> None:
    """PyTorch's, which it imports for operations without storage and which takes longer than all the rest."""
    code = (
        "import sys\nfrom lightning_tucodec.cli import main\n"
        "status = main(['models'])\nprint(status, 'torch._dynamo' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.splitlines()[-1] == "0 False"


def test_a_network_of_shapes_alone_has_those_of_a_whole_one(model: TucModel) -> None:
    whole = model.network
    with shapes_only():
        shapes = TucodecVAE(whole.config)
    found, expected = shapes.state_dict(), whole.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype)
        assert found[name].is_meta
    values = {name: (v.shape, v.dtype) for name, v in quantise_network(whole).items()}
    assert integer_layout(shapes) == values


@pytest.mark.parametrize("mode", CALLER_MODES)
def test_the_modes_of_the_caller_change_nothing(mode: str) -> None:
    image = photo("coffee.png", 48, 40)
    known = tuc.load("tiny-mse-1")
    expected = [known.compress(image, effort=effort) for effort in (0, 1)]
    bits = known.estimated_bits(image)
    state = torch.random.get_rng_state()
    with caller_mode(mode):
        model = TucModel(ModelFile.load(library.find("tiny-mse-1")))
        assert [model.compress(image, effort=effort) for effort in (0, 1)] == expected
        assert TucModel(model.file).estimated_bits(image) == bits
        assert TucModel(model.file).bit_map(image).sum() == pytest.approx(bits, rel=1e-6)
        shown = np.asarray(model.decompress(expected[0]))
    assert (shown == np.asarray(tuc.load("tiny-mse-1").decompress(expected[0]))).all()
    # The network serves training afterwards, though it was built inside.
    loss = model.network.g_a(torch.zeros(1, 3, 64, 64)).square().sum()
    loss.backward()
    assert all(value.grad is not None for value in model.network.g_a.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_threads_do_not_give_each_other_the_callers_type() -> None:
    """The default type is the process's: who ends first must leave it to the others."""
    first, second = own_modes(), own_modes()
    torch.set_default_dtype(torch.float64)
    try:
        with contextlib.ExitStack() as outer:
            outer.enter_context(first)
            inner = contextlib.ExitStack()
            inner.enter_context(second)
            outer.close()
            assert torch.get_default_dtype() == torch.float32
            inner.close()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_arrays_that_may_not_be_written_to() -> None:
    """As those of Pillow are; PyTorch warns of them, which is an error here."""
    image = photo("coffee.png", 48, 40).copy()
    image.flags.writeable = False
    model = tuc.load("tiny-mse-1")
    torch.set_warn_always(True)
    try:
        assert model.compress(image, effort=1) == model.compress(image.copy(), effort=1)
        assert pixels_ms_ssim(image, image) == 1.0
    finally:
        torch.set_warn_always(False)


def test_activations_that_are_not_finite_are_named() -> None:
    model = TucModel(tuc.load("tiny-mse-1").file)
    with torch.no_grad():
        next(model.network.g_a.parameters()).fill_(torch.nan)
    with pytest.raises(tuc.ModelFileError, match="not finite"):
        model.compress(photo("coffee.png", 32, 32))


@pytest.mark.parametrize("wrong", [None, 5, "x.tuc", np.zeros(4, np.uint8)])
def test_what_is_no_bytes_is_a_type_error(wrong: Any) -> None:
    with pytest.raises(TypeError, match="takes the bytes of a file"):
        tuc.decompress(wrong)


@pytest.mark.parametrize("shape", [(0, 0, 3), (0, 8, 3), (8, 0, 3)])
def test_an_empty_image_is_called_empty(model: TucModel, shape: tuple[int, int, int]) -> None:
    with pytest.raises(tuc.ImageInputError, match="pixels: the image is empty"):
        model.compress(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("effort", ["3", None, 1.5])
def test_effort_is_a_whole_number(model: TucModel, effort: Any) -> None:
    with pytest.raises(TypeError, match="effort is a whole number"):
        model.compress(photo("chelsea.png", 20, 20), effort=effort)
