"""Model files that lie: one line says so, before anything of the claimed size is allocated."""

import copy
import json
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save

import lightning_tucodec as tuc
from lightning_tucodec import cli
from lightning_tucodec.codecs import cards, library
from lightning_tucodec.codecs.cards import FORMAT
from lightning_tucodec.codecs.classical.codecs import Jpeg
from lightning_tucodec.codecs.learned.codec import TucModel
from lightning_tucodec.codecs.learned.model_file import ModelFile, freeze
from lightning_tucodec.coding.fixed_point import IntegerEntropyModel
from lightning_tucodec.errors import CorruptStreamError, ModelFileError
from lightning_tucodec.nn.codec import TucodecVAE
from lightning_tucodec.training.vae import resolve_codec
from tests.support import MICRO, photo

Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], None]


@pytest.fixture(scope="module")
def micro() -> ModelFile:
    torch.manual_seed(0)
    return freeze(TucodecVAE(resolve_codec("tiny", MICRO)), "micro", {"kodak": {"bpp": 0.1}})


def write(path: Path, micro: ModelFile, change: Change) -> Path:
    """The model's file with another description or other tensors."""
    description = {
        "format": FORMAT, "name": "micro", "config": copy.deepcopy(micro.config), "card": dict(micro.card),
    }  # fmt: skip
    tensors = dict(micro.tensors)
    change(description, tensors)
    text = description.get("raw") or json.dumps(description)
    path.write_bytes(save({k: v.contiguous() for k, v in tensors.items()}, {"tucodec": text}))
    return path


def config(part: str, key: str, value: Any) -> Change:
    return lambda description, _: description["config"][part].__setitem__(key, value)


def tensor(key: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda _, tensors: tensors.__setitem__(key, value(tensors[key]))


def top(key: str, value: Any) -> Change:
    return lambda description, _: description.__setitem__(key, value)


UNREADABLE: dict[str, Change] = {
    "deep JSON": top("raw", "[" * 100_000),
    "a list": top("raw", "[]"),
    "card": top("card", [1]),
    "config": top("config", [1]),
    "kodak": top("card", {"kodak": [1]}),
    "λ of text": top("card", {"lmbda": "100"}),
    "λ of nothing": top("card", {"lmbda": 0}),
    "λ that is not a number": top("card", {"lmbda": float("nan")}),
    "λ that no float holds": top("card", {"lmbda": 10**400}),
    "recipe": top("card", {"recipe": ["ssim"]}),
    "steps of text": top("card", {"opt_step": "10"}),
    "half a step": top("card", {"opt_step": 1.5}),
    "name of two lines": top("name", "a\nb"),
    "name that is a number": top("name", 3),
}
INTEGERS: dict[str, Change] = {
    "shift beyond floats": tensor("entropy.parameters.mu.shift", lambda v: v * 0 + 2**31 - 1),
    "shift below floats": tensor("entropy.parameters.mu.shift", lambda v: v * 0 - 2**31),
    "unequal shifts": tensor("entropy.parameters.upsilon.shift", lambda v: v + 1),
    "sigmoid": tensor("entropy.sigmoid", lambda v: -v),
}
UNFIT: dict[str, Change] = {
    "wide": config("transform", "widths", [0, 30_000, 30_000, 30_000]),
    "wider than memory": config("transform", "widths", [0, 1 << 62, 1 << 62, 1 << 62]),
    "deep": config("transform", "blocks", [0, 0, 1_000_000_000, 3]),
    "levels": config("context", "levels", 1_000_000_000),
    "centres": lambda d, _: d["config"].__setitem__("centres", 4_000_000_000),
    "short blocks": config("transform", "blocks", [0, 0]),
    "blocks of text": config("transform", "blocks", "many"),
    "no widths": config("hyper", "entropy_widths", None),
    "medians": tensor("medians", lambda v: v[:1]),
    "medians of two axes": tensor("medians", lambda v: v[:, None]),
    "medians of another type": tensor("medians", lambda v: v.float()),
    "shape of h_s": tensor("entropy.h_s.up1.weight", lambda v: v[:9]),
    "vector for a matrix": tensor("entropy.parameters.mu.weight", lambda v: v.flatten()),
    "shift of two": tensor("entropy.parameters.mu.shift", lambda v: v.repeat(2)),
    "not a number": tensor("network.h_a.conv1.weight", lambda v: v * torch.nan),
    "unknown tensor": lambda _, tensors: tensors.__setitem__("network.x", torch.zeros(1)),
    "missing table": lambda _, tensors: tensors.pop("laplace.tail"),  # type: ignore[arg-type,return-value]
    **INTEGERS,
}


def peak() -> int:
    """The largest resident set so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable(micro: ModelFile, tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "bad.safetensors", micro, UNREADABLE[name])
    with pytest.raises(ModelFileError, match=r"^\S*bad\.safetensors: [^\n]*$"):
        ModelFile.load(path)


@pytest.mark.parametrize("name", UNFIT)
def test_unfit(micro: ModelFile, tmp_path: Path, name: str) -> None:
    model = TucModel(ModelFile.load(write(tmp_path / "m.safetensors", micro, UNFIT[name])))
    before = peak()
    with pytest.raises(ModelFileError, match=r"^model micro: its content[^\n]*$"):
        _ = model.entropy_model
    if name not in ("unequal shifts", "sigmoid"):  # only the integers are wrong
        with pytest.raises(ModelFileError, match=r"^[^\n]*$"):
            _ = model.network
    assert peak() - before < 100 << 20


def test_unequal_shifts_are_refused_where_they_would_not_decode(micro: ModelFile) -> None:
    start = "entropy."
    integers = {k.removeprefix(start): v for k, v in micro.tensors.items() if k.startswith(start)}
    integers["parameters.upsilon.shift"] = integers["parameters.upsilon.shift"] - 1
    with pytest.raises(ModelFileError, match="differ in their shifts"):
        IntegerEntropyModel(integers)


def test_bad_neighbours_stop_nothing(
    micro: ModelFile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    for number, change in enumerate([*UNREADABLE.values(), *UNFIT.values()]):
        write(folder / f"a{number}.safetensors", micro, change)
    (folder / "folder.safetensors").mkdir()
    (folder / "a.safetensors").write_bytes(struct.pack("<Q", 1 << 60))
    micro.save(folder / "z.safetensors")
    monkeypatch.setenv("TUCODEC_MODELS", str(folder))
    stream = tmp_path / "x.tuc"
    stream.write_bytes(TucModel(micro).compress(photo("chelsea.png", 48, 32)))
    assert tuc.decompress(stream.read_bytes()).size == (48, 32)
    assert cli.main(["info", str(stream)]) == 0
    assert cli.main(["decompress", str(stream), "-o", str(tmp_path / "x.png")]) == 0
    with Image.open(tmp_path / "x.png") as image:
        assert image.size == (48, 32)
    capsys.readouterr()
    assert cli.main(["models"]) == 1
    out, err = capsys.readouterr()
    assert micro.id.hex() in out
    refused = {line.split(": ")[1] for line in err.splitlines()}
    assert len(refused) == len(err.splitlines())
    fit = len(UNREADABLE) + len(UNFIT) - len(INTEGERS)  # those show when the model codes
    assert refused == {str(folder / "a.safetensors")} | {
        str(folder / f"a{number}.safetensors") for number in range(fit)
    }
    with pytest.raises(ModelFileError, match=r"^\S*a14\.safetensors: model micro: its content"):
        library.load(folder / f"a{len(UNREADABLE)}.safetensors")
    assert "micro" in cards.models()


def test_loading_leaves_the_random_state(micro: ModelFile) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    micro.network()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_bomb_is_a_named_error() -> None:
    data = bytearray(Jpeg(50).encode(photo("chelsea.png", 32, 32)))
    at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    data[at + 5 : at + 9] = struct.pack(">HH", 60_000, 60_000)
    with pytest.raises(CorruptStreamError, match="not a whole JPEG file"):
        Jpeg(50).decode(bytes(data))


def test_weights_of_others_are_told_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    path.write_bytes(save({"weight": torch.zeros(3)}, {"format": "pt"}))
    with pytest.raises(ModelFileError, match=r"no model of this package; `tucodec export RUN"):
        ModelFile.load(path)
