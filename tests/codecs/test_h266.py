"""H.266 in `.tuc` files: parameter sets, gate, rate control, command line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from skimage.data import astronaut

from lightning_tucodec.cli import main
from lightning_tucodec.codecs.cards import models
from lightning_tucodec.codecs.colour import (
    Planes,
    chroma_turn,
    pad,
    planes_to_rgb,
    rgb_to_planes,
    turned,
)
from lightning_tucodec.codecs.decode import decompress
from lightning_tucodec.codecs.h266 import parameter_sets
from lightning_tucodec.codecs.h266.codec import H266, NO_MODEL, OFFSETS, without_filter
from lightning_tucodec.codecs.h266.postfilter import FilterModel, apply, fit
from lightning_tucodec.codecs.h266.vvc import PRESETS, TOOLS, Vvc
from lightning_tucodec.codecs.learned.model_file import ModelFile
from lightning_tucodec.codecs.library import find, load, load_any
from lightning_tucodec.codecs.registry import codec
from lightning_tucodec.coding.container import CodecKind, Container, pack, unpack
from lightning_tucodec.errors import (
    CorruptStreamError,
    ImageInputError,
    ModelFileError,
    UnknownModelError,
    UnsupportedVersionError,
)
from lightning_tucodec.nn.postfilter import PostFilter, PostFilterConfig
from lightning_tucodec.quality.metrics import sse
from tests.support import CALLER_MODES, caller_mode

PHOTO = np.ascontiguousarray(astronaut()[40:103, 150:241])
FAST = "preset=faster,chroma_qp_offset=-4"


def filter_file(folder: Path, name: str, noise: float) -> FilterModel:
    """A filter whose corrections are noise, in the model folder."""
    torch.manual_seed(0)
    network = PostFilter(PostFilterConfig(channels=8, blocks=1))
    with torch.no_grad():
        network.tail.weight.normal_(std=noise)
    model = FilterModel.freeze(network, name, {"note": "for tests"})
    model.file.save(folder / f"{name}.safetensors")
    return model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUCODEC_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("tools", TOOLS)
def test_parameter_sets_cost_three_bytes_and_come_back(preset: str, tools: str) -> None:
    for height, width, offset in ((16, 32, 0), (22, 18, -4), (40, 26, 3)):
        image = PHOTO[20 : 20 + height, 20 : 20 + width]
        stream = Vvc(50, preset, offset, tools=tools).encode_planes(rgb_to_planes(image))
        short = parameter_sets.strip(stream, height, width)
        assert len(stream) - len(short) > 50
        assert parameter_sets.restore(short, height, width) == stream


def test_an_adaptation_set_before_the_slice_stays_in() -> None:
    stream = Vvc(30, "faster").encode_planes(rgb_to_planes(np.ascontiguousarray(PHOTO[:62, :90])))
    assert b"\x00\x00\x00\x01\x00\x89" in stream
    short = parameter_sets.strip(stream, 62, 90)
    assert len(stream) - len(short) > 50
    assert parameter_sets.restore(short, 62, 90) == stream


def test_other_parameter_sets_stay_in() -> None:
    stream = Vvc(45, "faster").encode_planes(rgb_to_planes(pad(PHOTO, 2, 16)))
    other = bytearray(stream)
    other[20] ^= 1
    for kept in (bytes(other), b"", stream[:9], b"anything"):
        data = parameter_sets.strip(kept, 64, 92)
        assert data == b"\xff" + kept
        assert parameter_sets.restore(data, 64, 92) == kept
    for damaged in (b"", b"\x00\x10", b"\x0d\x10\x0c123", b"\x00\x10\x19123"):
        with pytest.raises(CorruptStreamError):
            parameter_sets.restore(damaged, 64, 92)


def test_orthonormal_colour_comes_back_and_weighs_all_planes_alike() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (32, 48, 3)).astype(np.uint8)
    planes = rgb_to_planes(image, "444", "orthonormal")
    back = planes_to_rgb(planes, "orthonormal")
    assert np.abs(back.astype(int) - image).max() <= 1
    gray = np.full_like(image, 128)
    base = rgb_to_planes(gray, "444", "orthonormal")
    errors = []
    for number in range(3):
        moved = list(base)
        steps = rng.choice([-40, 40], moved[number].shape)
        moved[number] = (moved[number] + steps).astype(np.uint16)
        errors.append(sse(gray, planes_to_rgb(type(planes)(*moved), "orthonormal")))
    assert max(errors) < 1.05 * min(errors)


def test_without_filter_the_file_is_smaller_than_stream_and_header(folder: Path) -> None:
    setting = codec(f"vvc+postfilter:qp=42,{FAST},filter=none,tools=preset,turn=0")
    data = setting.encode(PHOTO)
    plain = codec(f"vvc:qp=42,{FAST},colour=orthonormal")
    assert len(data) < len(plain.encode(PHOTO))
    assert np.array_equal(setting.decode(data), plain.decode(plain.encode(PHOTO)))
    container = unpack(data)
    assert (container.kind, container.flags, container.model_id) == (CodecKind.VVC, 0, NO_MODEL)
    assert np.array_equal(np.asarray(decompress(data)), setting.decode(data))
    assert setting.name == f"vvc+postfilter:qp=42,{FAST},filter=none,tools=preset,turn=0"
    assert "filter" in setting.describe()


def test_the_gate_opens_only_for_a_filter_that_helps(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filter_file(folder, "bad", 0.5)
    bad = H266(42, "faster", -4, tools="preset", turn=0, filter="bad")
    plain = H266(42, "faster", -4, tools="preset", turn=0, filter="none")
    assert bad.encode(PHOTO) == plain.encode(PHOTO)

    good = filter_file(folder, "good", 0.0)
    given = bytes(range(good.weight_bytes))
    monkeypatch.setattr(FilterModel, "fit", lambda *arguments: (given, pad(PHOTO, 2, 16)))

    def perfect(
        self: FilterModel, planes: object, qp: int, transform: str, weights: bytes
    ) -> object:
        assert weights == given
        return pad(PHOTO, 2, 16)

    monkeypatch.setattr(FilterModel, "apply", perfect)
    setting = H266(42, "faster", -4, tools="preset", turn=0, filter="good")
    coded = setting.code(PHOTO)
    container = unpack(coded.data)
    assert (container.flags, container.model_id) == (1, good.id)
    assert np.array_equal(coded.shown, PHOTO)
    assert np.array_equal(np.asarray(decompress(coded.data)), PHOTO)
    assert len(coded.data) == len(plain.encode(PHOTO)) + len(given)
    assert without_filter(coded.data) == plain.encode(PHOTO)
    assert without_filter(plain.encode(PHOTO)) == plain.encode(PHOTO)
    assert good.name in setting.describe()["filter"]


def test_the_weights_are_fitted_to_the_image(folder: Path) -> None:
    filter_file(folder, "noise", 0.02)
    setting = H266(42, "faster", -4, tools="preset", turn=0, filter="noise")
    planes = rgb_to_planes(pad(PHOTO, 2, 16), transform="orthonormal")
    model = setting.model()
    assert model is not None
    shown = planes_to_rgb(planes, "orthonormal")
    hidden = bytes(range(30, 30 + model.weight_bytes))
    target = model.apply(planes, 42, "orthonormal", hidden)
    found, filtered = model.fit(planes, 42, "orthonormal", target)
    assert np.array_equal(filtered, model.apply(planes, 42, "orthonormal", found))
    errors = [sse(target, x) for x in (shown, filtered)]
    assert errors[1] < errors[0] / 4


def test_bands_leave_no_seams(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = PostFilter(PostFilterConfig(channels=8, blocks=2)).eval()
    with torch.no_grad():
        network.tail.weight.normal_(std=0.02)
    image = np.tile(pad(PHOTO, 2, 16), (3, 1, 1))
    planes = rgb_to_planes(image, transform="orthonormal")
    weights, whole = fit(network, planes, 40, "orthonormal", image)
    assert np.array_equal(whole, apply(network, planes, 40, "orthonormal", weights))
    monkeypatch.setattr("lightning_tucodec.codecs.h266.postfilter.PIXELS", 48 * image.shape[1])
    again, kept = fit(network, planes, 40, "orthonormal", image)
    assert np.abs(again.astype(int) - weights).max() <= 1
    monkeypatch.setattr("lightning_tucodec.codecs.h266.postfilter.KEPT_PIXELS", 0)
    for found, expected in zip(
        fit(network, planes, 40, "orthonormal", image), (again, kept), strict=True
    ):
        assert np.array_equal(found, expected)  # with the corrections made twice
    banded = apply(network, planes, 40, "orthonormal", weights)
    assert banded.shape == whole.shape
    assert np.abs(banded.astype(int) - whole).max() <= 1
    assert np.mean(banded != whole) < 1e-3


@pytest.mark.parametrize("mode", CALLER_MODES)
def test_the_modes_of_the_caller_change_no_filter(mode: str) -> None:
    planes = rgb_to_planes(pad(PHOTO, 2, 16), transform="orthonormal")
    known = FilterModel(ModelFile.load(find("vvc-postfilter")))
    weights, _ = known.fit(planes, 40, "orthonormal", pad(PHOTO, 2, 16))
    shown = known.apply(planes, 40, "orthonormal", weights)
    with caller_mode(mode):
        model = FilterModel(known.file)
        assert model.fit(planes, 40, "orthonormal", pad(PHOTO, 2, 16))[0] == weights
        assert np.array_equal(model.apply(planes, 40, "orthonormal", weights), shown)
    assert not any(value.is_inference() for value in model.network.parameters())


def test_turned_chroma_comes_back() -> None:
    planes = rgb_to_planes(pad(PHOTO, 2, 16), transform="orthonormal")
    for steps in (-128, -37, 1, 64, 127):
        back = turned(turned(planes, steps), -steps)
        assert np.array_equal(back.y, planes.y)
        for ours, theirs in zip(back[1:], planes[1:], strict=True):
            assert np.abs(ours.astype(int) - theirs).max() <= 1


@given(angle=st.floats(-1.5, 1.5), ratio=st.floats(0.1, 0.8))
def test_the_turn_finds_the_principal_axes(angle: float, ratio: float) -> None:
    rng = np.random.default_rng(0)
    first, second = 80 * rng.standard_normal((16, 16)), ratio * 80 * rng.standard_normal((16, 16))
    cb = np.cos(angle) * first - np.sin(angle) * second
    cr = np.sin(angle) * first + np.cos(angle) * second
    chroma = [np.clip(np.rint(512 + x), 0, 1023).astype(np.uint16) for x in (cb, cr)]
    planes = Planes(np.zeros((32, 32), np.uint16), *chroma)
    own = turned(planes, chroma_turn(planes))
    correlation = np.corrcoef(own.cb.ravel(), own.cr.ravel())[0, 1]
    assert abs(correlation) < 0.1
    assert own.cb.std() > own.cr.std()


def test_offset_and_turn_are_the_cheapest_with_a_quick_preset() -> None:
    own = chroma_turn(rgb_to_planes(pad(PHOTO, 2, 16), transform="orthonormal"))
    assert own != 0
    rest: dict[str, Any] = {"colour": "orthonormal", "filter": "none", "tools": "preset"}
    tried = [(offset, turn) for offset in OFFSETS for turn in (0, own)]
    costs = [H266(40, "faster", o, turn=t, **rest).code(PHOTO).cost for o, t in tried]
    offset, turn = tried[int(np.argmin(costs))]
    found = H266(40, "fast", offset, turn=turn, **rest).encode(PHOTO)
    assert H266(40, "fast", **rest).encode(PHOTO) == found


def test_more_tools_find_cheaper_pictures() -> None:
    costs = {t: H266(40, "fast", -4, filter="none", tools=t).code(PHOTO).cost for t in TOOLS}
    assert costs["deep"] < costs["wide"] < costs["preset"]
    # What a longer search finds is little: on one picture it may be worse.
    assert costs["thorough"] < costs["wide"]
    assert costs["thorough"] != costs["deep"]


def test_files_that_cannot_be(folder: Path) -> None:
    strip = unpack(
        H266(42, "faster", -4, tools="preset", turn=0, filter="none").encode(PHOTO)
    ).strips[0]
    assert strip is not None

    def tuc(strips: tuple[bytes, ...], width: int = 91, flags: int = 0) -> bytes:
        return pack(Container(CodecKind.VVC, NO_MODEL, width, 63, strips, flags))

    assert decompress(tuc((strip,))).size == (91, 63)
    cases = [(b"",), (strip[:1],), (strip[:30],), (b"\xff" + strip[1:],), (strip, strip)]
    for strips in cases:
        with pytest.raises(CorruptStreamError):
            decompress(tuc(strips))
    for width in (16385, 190):
        with pytest.raises(CorruptStreamError):
            decompress(tuc((strip,), width))
    with pytest.raises(UnknownModelError, match="0000000000000000"):
        decompress(tuc((strip,), flags=1))
    for flags in (2, 3, 8):
        with pytest.raises(UnsupportedVersionError, match=f"flags {flags:#x} that are unknown"):
            decompress(tuc((strip,), flags=flags))
    with pytest.raises(ImageInputError, match=r"16385×1 pixels.* sides up to 16384"):
        H266(42, filter="none").encode(np.zeros((1, 16385, 3), np.uint8))


def test_filters_are_models_of_their_own_kind(folder: Path) -> None:
    model = filter_file(folder, "mine", 0.1)
    assert models()["mine"]["id"] == model.id.hex()
    again = load_any("mine")
    assert isinstance(again, FilterModel)
    for ours, theirs in zip(model.network.parameters(), again.network.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(UnknownModelError, match="mine is a post-filter"):
        load("mine")
    with pytest.raises(UnknownModelError, match="tiny-mse-2 is not a post-filter"):
        H266(40, filter="tiny-mse-2").encode(PHOTO)
    file = model.file
    tensors = {name: tensor for name, tensor in file.tensors.items() if "head" not in name}
    broken = FilterModel(type(file)("broken", file.config, tensors, {}))
    with pytest.raises(ModelFileError, match="broken: its content is inconsistent"):
        _ = broken.network


def test_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = tmp_path / "photo.png"
    Image.fromarray(PHOTO[:40, :60]).save(photo)
    out, shown = str(tmp_path / "photo.tuc"), str(tmp_path / "shown.png")
    words = ["compress", str(photo), "-o", out, "--preset", "faster", "--json", "--recon", shown]
    assert main([*words, "--model", "vvc", "--target-bpp", "2"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["bpp"] <= 2
    assert row["bytes"] == Path(out).stat().st_size
    assert row["psnr"] > 25
    assert row["qp"] > 20
    assert main(["decompress", out, "-o", str(tmp_path / "back.png")]) == 0
    with Image.open(shown) as first, Image.open(tmp_path / "back.png") as second:
        assert np.array_equal(np.asarray(first), np.asarray(second))
    assert main(["info", out]) == 0
    assert "vvc" in capsys.readouterr().out
    assert main([*words, "--model", "vvc"]) == 1
    assert "--model vvc needs --qp or a --target-" in capsys.readouterr().err
    assert main(["compress", str(photo), "-o", out, "--qp", "30"]) == 1
    assert "--qp is an option of --model vvc and vvc+postfilter" in capsys.readouterr().err
