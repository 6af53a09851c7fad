"""Networks of CompressAI's form as codecs: files, imports, the zoo, what is trusted, what is bad input."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressai.models import CompressionModel
from numpy.typing import NDArray
from PIL import Image

import lightning_tucodec as tuc
from lightning_tucodec import cli
from lightning_tucodec.codecs import library, registry
from lightning_tucodec.codecs.cards import read_card
from lightning_tucodec.codecs.learned.model_file import ModelFile
from lightning_tucodec.codecs.network.build import build, trusting
from lightning_tucodec.codecs.network.codec import NetworkModel, freeze_network
from lightning_tucodec.coding.container import CodecKind, Container, pack, unpack
from lightning_tucodec.errors import (
    ConfigError,
    CorruptStreamError,
    ModelFileError,
    UnknownModelError,
    UnsupportedVersionError,
)
from lightning_tucodec.nn.blocks import pad_to_multiple
from lightning_tucodec.quality.curve_files import family
from lightning_tucodec.quality.metrics import as_tensor
from tests.codecs import zoo
from tests.support import CALLER_MODES, caller_mode, photo

EXACT = {"JointAutoregressiveHierarchicalPriors", "Cheng2020Anchor", "Cheng2020Attention"}
"""What the exact engine codes."""


@pytest.fixture(scope="module", params=zoo.FAMILIES)
def coder(request: pytest.FixtureRequest) -> NetworkModel:
    return NetworkModel(zoo.model(request.param))


def family_of(coder: NetworkModel) -> str:
    return str(coder.file.config["class_path"]).rpartition(".")[2]


def test_a_file_holds_what_the_network_codes(coder: NetworkModel, cat: NDArray[np.uint8]) -> None:
    data = coder.encode(cat)
    shown = coder.decode(data)
    container = unpack(data)
    assert container.kind == CodecKind.NETWORK
    exact = family_of(coder) in EXACT
    assert bool(container.flags & 1) == exact
    assert bool(container.flags & 2) == family_of(coder).endswith("Vbr")
    if exact:
        return
    # What CompressAI itself, with tables of its own, makes of the same image.
    reference: Any = zoo.network(family_of(coder))
    options: dict[str, Any] = {}
    if coder.rates is not None:
        options = {"s": coder.rates.levels - 1}
        reference.update(force=True, scale=reference.Gain[-1])
    else:
        reference.update(force=True)
    x = pad_to_multiple(as_tensor(cat) / 255, coder.stride)
    with torch.no_grad():
        answer = reference.compress(x, **options)
        x_hat = reference.decompress(answer["strings"], answer["shape"], **options)["x_hat"]
    bytes_of_theirs = sum(len(strings[0]) for strings in answer["strings"])
    assert 0 < len(data) - bytes_of_theirs < 64
    theirs = (x_hat[0, :, :75, :101] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    assert (shown == theirs).all()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 200), (64, 128), (65, 129)])
def test_any_size(coder: NetworkModel, height: int, width: int) -> None:
    image = photo("coffee.png", width, height)
    assert coder.decode(coder.encode(image)).shape == (height, width, 3)


def test_a_quality_is_of_a_variable_rate_network(
    coder: NetworkModel, cat: NDArray[np.uint8]
) -> None:
    if coder.rates is None:
        with pytest.raises(ConfigError, match=r"^micro has one rate, and takes no quality$"):
            coder.at(1)
        return
    sizes = {}
    for quality in (0, 2.5, 7):
        data = coder.at(quality).encode(cat)
        sizes[quality] = len(data)
        # Any of the same model's decoders reads it.
        assert (coder.at(1).decode(data) == coder.at(quality).decode(data)).all()
    assert sizes[0] <= sizes[2.5] <= sizes[7]
    assert coder.at(2.5).name == "micro:quality=2.5"
    with pytest.raises(ConfigError, match="quality 8 is not within 0 … 7"):
        coder.at(8)


def strip_of(data: bytes) -> bytes:
    (strip,) = unpack(data).strips
    assert strip is not None
    return strip


def test_a_file_that_lies(cat: NDArray[np.uint8]) -> None:
    coder = NetworkModel(zoo.model("MeanScaleHyperprior"))
    strip = strip_of(coder.encode(cat))

    def decode(strip: bytes, flags: int = 0, identity: bytes = coder.id) -> None:
        coder.decode(pack(Container(CodecKind.NETWORK, identity, 101, 75, (strip,), flags)))

    decode(strip)
    for bad in (
        b"",
        b"\0",
        b"\1abcd",
        b"\2",
        b"\2\xff\xff\xff\xff\x0f",
        strip[:-4],
        strip + b"1234",
    ):
        with pytest.raises(CorruptStreamError):
            decode(bad)
    with pytest.raises(CorruptStreamError, match="3 segments, its model writes 2"):
        decode(b"\3\0\0" + strip[2:])
    with pytest.raises(CorruptStreamError, match="quality"):
        decode(b"\0\0" + strip, 2)
    with pytest.raises(UnsupportedVersionError, match="exact engine"):
        decode(strip, 1)
    with pytest.raises(UnsupportedVersionError, match="flags"):
        decode(strip, 4)
    with pytest.raises(UnknownModelError, match="not with micro"):
        decode(strip, 0, bytes(8))


def test_a_file_of_another_machine_is_refused_and_not_noise(cat: NDArray[np.uint8]) -> None:
    """Its probabilities come out a little differently there, as they do between processors."""
    here, there = (NetworkModel(zoo.model("MeanScaleHyperprior")) for _ in range(2))
    data = here.encode(cat)
    network: Any = there.network
    with torch.no_grad():
        network.h_s[-1].bias.add_(0.4)
    with pytest.raises(CorruptStreamError, match="another processor, device, PyTorch"):
        there.decode(data)


def test_values_that_are_no_numbers_end(cat: NDArray[np.uint8]) -> None:
    """CompressAI's encoder would go on for ever."""
    for name in ("FactorizedPrior", "JointAutoregressiveHierarchicalPriorsVbr", "Cheng2020Anchor"):
        coder = NetworkModel(zoo.model(name))
        _ = coder.engine
        network: Any = coder.network
        with torch.no_grad():
            next(network.g_a.parameters()).fill_(torch.nan)
        with pytest.raises(ModelFileError, match=r"no numbers|not finite"):
            coder.encode(cat)


# --- Commands --------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cat: NDArray[np.uint8]) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUCODEC_MODELS", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    Image.fromarray(cat).save("cat.png")
    return tmp_path


def fails(line: str, capsys: pytest.CaptureFixture[str], status: int = 1) -> str:
    capsys.readouterr()
    assert cli.main(line.split()) == status
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


OWN = """
from compressai.models import MeanScaleHyperprior


class Mine(MeanScaleHyperprior):
    def __init__(self, width: int = 8) -> None:
        super().__init__(width, width)


class Half:
    pass


class NoCoder(__import__("torch").nn.Module):
    def forward(self, x):
        return {}


class Exits(MeanScaleHyperprior):
    def __init__(self):
        raise SystemExit(3)
"""


def test_code_of_others_is_imported_only_where_it_is_trusted(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "tests_own.py").write_text(OWN)
    description = {"class_path": "tests_own.Mine", "init_args": {"width": 6}}
    freeze_network(build(description), description, "mine", {}).save(folder / "mine.safetensors")
    code = "compress cat.png -o cat.tuc --model mine"
    for line in (code, "evaluate cat.png --codec mine -o r.json", "models"):
        said = fails(line, capsys)
        assert re.search(
            r"model mine needs the class tests_own\.Mine, .*add --trust tests_own$", said
        ), said
    assert cli.main(f"{code} --trust tests_own".split()) == 0
    decompress = "decompress cat.tuc -o cat2.png"
    library._load.forget()  # as in another process
    assert fails(decompress, capsys).endswith("add --trust tests_own\n")
    assert cli.main(f"{decompress} --trust other --trust tests_own".split()) == 0
    evaluate = "evaluate cat.png --codec mine -o r.json --workers 1"
    assert cli.main(f"{evaluate} --trust tests_own".split()) == 0


def test_bad_classes_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "tests_bad.py").write_text(OWN)
    torch.save(zoo.network("MeanScaleHyperprior").state_dict(), "c.pth")
    start = "import c.pth -o m.safetensors --network"
    for network, told in {
        "tests_bad.Half": "tests_bad.Half is no network: it must be a class of torch.nn.Module",
        "tests_bad.NoCoder": "tests_bad.NoCoder has no method compress: a network needs CompressAI's forward",
        "tests_bad.Absent": "tests_bad.Absent cannot be imported (AttributeError",
        "absent_module.X": "absent_module.X cannot be imported (ModuleNotFoundError",
        "mbt2019": "'mbt2019' is no network of CompressAI's zoo (bmshj2018-factorized, ",
        "compressai.models.MeanScaleHyperprior --args {K:3}": "does not take these arguments",
        "compressai.models.MeanScaleHyperprior --args {N:eight,M:8}": "does not take these arguments",
        "compressai.models.MeanScaleHyperprior --args [8,12]": "--args: must be a mapping",
        'compressai.models.MeanScaleHyperprior --args {"N":60000,"M":60000}': "larger than its weights",
        "tests_bad.Exits --args {}": "tests_bad.Exits does not take these arguments (none): 3",
        "compressai.models.MeanScaleHyperprior --quality 1": "--quality is for networks of the zoo",
        "mbt2018-mean --args {N:8}": "--args is for a class",
        "mbt2018-mean --quality 9": "mbt2018-mean, quality 9: Invalid quality",
        "mbt2018-mean --quality 1": "c.pth: not a checkpoint of mbt2018-mean at quality 1 (size mismatch",
        "mbt2018": "c.pth: not a checkpoint of mbt2018 (Missing key",
        "cheng2020-attn": "c.pth: not a checkpoint of cheng2020-attn",
    }.items():
        assert told in fails(
            f"{start} {network}".replace("{K:3}", "{K: 3}").replace(" 3}", "3}"), capsys
        )
    assert not (folder / "m.safetensors").exists()


def test_checkpoints_that_are_none(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (folder / "touched",)

    state = zoo.network("MeanScaleHyperprior").state_dict()
    torch.save({"state_dict": state, "evil": Evil()}, "evil.pth")
    torch.save([1, 2], "list.pth")
    torch.save({"state_dict": {"a": 1}}, "numbers.pth")
    Path("text.pth").write_text("weights")
    for name in ("evil", "list", "numbers", "text", "absent"):
        said = fails(f"import {name}.pth --network mbt2018-mean -o m.safetensors", capsys)
        assert said.startswith(f"tucodec: {name}.pth: ")
    assert not (folder / "touched").exists()
    description = {
        "class_path": "compressai.models.MeanScaleHyperprior",
        "init_args": {"N": 8, "M": 8},
    }
    freeze_network(build(description), description, "own", {}).save(folder / "own.safetensors")
    said = fails("import own.safetensors --network mbt2018-mean -o m.safetensors", capsys)
    assert "own.safetensors: not a checkpoint of mbt2018-mean (it has no g_a.0.weight)" in said


def test_compressai_is_imported_without_warnings() -> None:
    code = (
        "from lightning_tucodec.codecs.network.build import find_class\n"
        "from lightning_tucodec.codecs.network.zoo import of_zoo\n"
        "find_class('compressai.models.FactorizedPrior'), of_zoo('mbt2018', 1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""


OLD = {"matrices": "_matrix", "biases": "_bias", "factors": "_factor"}


@pytest.mark.parametrize("form", ["plain", "state_dict", "old", "data parallel"])
def test_forms_of_checkpoints(form: str, folder: Path, cat: NDArray[np.uint8]) -> None:
    network: Any = zoo.network("MeanScaleHyperprior")
    network.update()
    content: Any = dict(network.state_dict())
    if form == "old":
        content = {
            re.sub(r"(matrices|biases|factors)\.(\d)", lambda m: f"{OLD[m[1]]}{m[2]}", key): value
            for key, value in content.items()
        }
    elif form == "data parallel":
        content = {f"module.{key}": value for key, value in content.items()}
    elif form == "state_dict":
        content = {"epoch": 3, "state_dict": content, "optimizer": {"state": {}}, "loss": 1.0}
    torch.save(content, "c.pth.tar")
    assert (
        cli.main(["import", "c.pth.tar", "--network", "mbt2018-mean", "-o", "m.safetensors"]) == 0
    )
    loaded = ModelFile.load(Path("m.safetensors"))
    assert loaded.config["class_path"] == "compressai.models.google.MeanScaleHyperprior"
    assert loaded.config["init_args"] == {"N": 8, "M": 12}
    assert NetworkModel(loaded).decode(NetworkModel(loaded).encode(cat)).shape == cat.shape
    assert tuc.decompress(NetworkModel(loaded).encode(cat)).size == (101, 75)


def test_pytorchs_advice_on_compressai_is_not_shown() -> None:
    code = """
import sys, warnings
from lightning_tucodec.codecs.network.build import find_class
before = list(warnings.filters)
find_class("compressai.models.FactorizedPrior")
assert "compressai.zoo" in sys.modules and warnings.filters == before
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    package = Path(tuc.__file__).parent
    own = re.compile(r"^\s*(from|import) compressai|import_module\(.compressai", re.MULTILINE)
    assert not [path for path in package.rglob("*.py") if own.search(path.read_text())]


def test_arguments_and_quality_of_an_import(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(zoo.network("Elic2022Official").state_dict(), "elic.pth")
    line = "import elic.pth --network compressai.models.Elic2022Official"
    said = fails(line, capsys)
    assert "elic.pth: not a checkpoint of compressai.models.Elic2022Official" in said
    assert "); --args gives the class's arguments" in said
    words = [*line.split(), "--args", "{N: 8, M: 12, groups: [2, 4, 6]}"]
    assert cli.main(words) == 0
    assert ModelFile.load(Path("Elic2022Official.safetensors")).name == "Elic2022Official"
    torch.save(zoo.network("ScaleHyperpriorVbr").state_dict(), "vbr.pth")
    assert cli.main(["import", "vbr.pth", "--network", "bmshj2018-hyperprior-vbr"]) == 0
    said = fails("import vbr.pth --network bmshj2018-hyperprior-vbr --quality 3", capsys)
    assert "--quality is chosen when bmshj2018-hyperprior-vbr codes" in said
    vbr = ModelFile.load(Path("bmshj2018-hyperprior-vbr.safetensors"))
    assert vbr.config["init_args"] == {"N": 8, "M": 12, "vr_entbttlnck": True}


def test_the_zoo_in_evaluate_compare_and_allocate(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(folder / "hub"))
    said = fails("evaluate cat.png --codec compressai:mbt2018-mean,quality=3 -o r.json", capsys)
    assert re.search(r"mbt2018-mean, quality 3: its weights are not on this machine; download http\S+tar to "
                     r"\S+hub/checkpoints, or give weights=FILE$", said)  # fmt: skip
    for text, told in {
        "compressai:mbt2018-mean": "needs a quality, as in compressai:mbt2018-mean,quality=3",
        "compressai:nothing,quality=1": "'nothing' is no network of CompressAI's zoo",
        "compressai:mbt2018-mean,quality=one": "quality=one is not a number",
        "compressai:mbt2018-mean,quality=nan": "quality=nan is not a number",
        "compressai:mbt2018-mean,quality=inf": "quality=inf is not a number",
        "compressai:mbt2018-mean,quality=": "quality is not KEY=VALUE",
        "compressai:mbt2018-mean,quality=1.5": "quality is a whole number",
        "compressai:mbt2018-mean,quality=1,metric=psnr": "metric is mse or ms-ssim, not psnr",
        "compressai:mbt2018-mean,quality=1,size=3": "'size' is none of quality=N",
        "compressai:mbt2018-mean,quality=1,quality=2": "quality is given twice",
        "compressai:mbt2018-mean,quality=1,weights=no.pth": "no.pth: No such file",
    }.items():
        assert told in fails(f"evaluate cat.png --codec {text} -o r.json", capsys)
    torch.save(zoo.network("ScaleHyperpriorVbr").state_dict(), "vbr.pth")
    zoo_codecs = [
        f"compressai:bmshj2018-hyperprior-vbr,quality={q},weights=vbr.pth" for q in (0, 2.5, 5, 7)
    ]
    coders = registry.codecs(zoo_codecs)
    names = [coder.name for coder in coders]
    assert len({id(coder.network) for coder in coders if isinstance(coder, NetworkModel)}) == 1
    assert [registry.codec(name).name for name in names] == names
    codecs = [*zoo_codecs, *(f"jpeg:q={q}" for q in (10, 30, 60, 90))]
    words = ["evaluate", "cat.png", "--workers", "1", "-o", "r.json", "--codec", *codecs]
    assert cli.main(words) == 0
    curve = "compressai:bmshj2018-hyperprior-vbr,metric=mse"
    assert {family(row["codec"]) for row in json.loads(Path("r.json").read_text())["sets"]} == {
        "jpeg",
        curve,
    }
    assert cli.main(["compare", "r.json", "-o", "page.html", "--samples", "10"]) == 0
    assert curve in Path("page.html").read_text()
    allocate = ["allocate", "cat.png", "--max-bpp", "30", "--workers", "1", "-o", "submission"]
    assert cli.main([*allocate, "--candidate", *zoo_codecs]) == 0
    Path("vbr.pth").unlink()
    assert cli.main(["clic", "decode", "submission", "-o", "decoded"]) == 0
    assert Path("decoded/cat.png").exists()


def test_a_target_finds_the_rate_of_a_variable_network(folder: Path) -> None:
    zoo.model("MeanScaleHyperpriorVbr", "vbr").save(folder / "vbr.safetensors")
    model = NetworkModel(ModelFile.load(folder / "vbr.safetensors"))
    size = len(model.at(3).encode(np.asarray(Image.open("cat.png"))))
    bpp = 8 * size / (101 * 75) + 1e-6
    line = f"compress cat.png -o cat.tuc --model vbr.safetensors --target-bpp {bpp}"
    assert cli.main(line.split()) == 0
    assert size / 1.3 < Path("cat.tuc").stat().st_size <= size
    assert (
        cli.main(
            ["compress", "cat.png", "-o", "q.tuc", "--model", "vbr.safetensors", "--quality", "3"]
        )
        == 0
    )
    assert Path("q.tuc").stat().st_size == size


def test_a_target_refuses_what_a_variable_network_does_not_take(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zoo.model("MeanScaleHyperpriorVbr", "vbr").save(folder / "vbr.safetensors")
    line = "compress cat.png -o cat.tuc --model vbr.safetensors"
    for more, told in {
        "--target-bpp 1 --preset slow": "--preset is an option of --model vvc",
        "--target-psnr 20 --effort 3": "--effort is for this package's own networks",
        "--quality 3 --preset slow": "--preset is an option of --model vvc",
        "--quality 9": "quality 9 is not within 0 … 7",
    }.items():
        assert told in fails(f"{line} {more}", capsys)
    for more in (
        "--quality nan",
        "--quality inf",
        "--quality 3 --target-bpp 1",
        "--qp 3 --quality 3",
    ):
        with pytest.raises(SystemExit) as status:
            cli.main([*line.split(), *more.split()])
        assert status.value.code == 2
        assert "Traceback" not in capsys.readouterr().err
    for value in ("nan", "inf", "x", "9"):
        text = f"evaluate cat.png --codec vbr.safetensors:quality={value} -o r.json"
        assert f"quality={value}" in fails(text, capsys)
    assert not (folder / "cat.tuc").exists()


def test_a_decode_reads_the_description_of_a_file_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, cat: NDArray[np.uint8]
) -> None:
    model = zoo.model("MeanScaleHyperprior", "mine")
    model.save(folder / "mine.safetensors")
    data = NetworkModel(model).encode(cat)
    read: list[Path] = []

    def counting(path: Path) -> Any:
        read.append(path)
        return read_card(path)

    monkeypatch.setattr(library, "read_card", counting)
    for _ in range(3):
        assert tuc.decompress(data).size == (101, 75)
    assert len([path for path in read if path.name == "mine.safetensors"]) == 1


def test_options_that_are_not_for_networks(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zoo.model("MeanScaleHyperprior").save(folder / "micro.safetensors")
    compress = "compress cat.png -o cat.tuc --model micro.safetensors"
    assert "--effort is for this package's own networks" in fails(f"{compress} --effort 1", capsys)
    assert "micro has one rate" in fails(f"{compress} --quality 1", capsys)
    own = "compress cat.png -o cat.tuc --model tiny-mse-2"
    assert "tiny-mse-2 has one rate, and takes no quality" in fails(f"{own} --quality 1", capsys)
    assert "takes quality=… here, and no effort" in fails(
        "evaluate cat.png --codec micro.safetensors:effort=1 -o r.json", capsys
    )
    assert not (folder / "cat.tuc").exists()


# --- Model files that lie --------------------------------------------------------------------------


def test_a_small_file_claims_no_large_network() -> None:
    file = zoo.model("MeanScaleHyperprior")
    for arguments in ({"N": 30_000, "M": 30_000}, {"N": 8, "M": 10**9}, {"N": -1, "M": 3}):
        config = {**file.config, "init_args": arguments}
        with pytest.raises(ModelFileError, match=r"^model lie[^\n]*$"):
            _ = NetworkModel(ModelFile("lie", config, file.tensors, {})).network


@pytest.mark.parametrize(
    "change",
    [
        {"class_path": "os.system"}, {"class_path": "compressai.models.google.nn.Sequential"},
        {"class_path": "compressai.layers.GDN"}, {"class_path": "compressai.models.conv"},
        {"class_path": 3}, {"class_path": "MeanScaleHyperprior"}, {"init_args": [8, 12]},
        {"init_args": {"N": 8}}, {"init_args": {"N": 8, "M": 14}}, {"init_args": {"N": {}, "M": "x"}},
    ],
    ids=str,
)  # fmt: skip
def test_descriptions_that_lie(change: dict[str, Any]) -> None:
    file = zoo.model("MeanScaleHyperprior")
    lie = ModelFile("lie", {**file.config, **change}, file.tensors, {})
    with pytest.raises(ModelFileError, match=r"^model lie[^\n]*$"):
        _ = NetworkModel(lie).network


def test_tensors_that_lie() -> None:
    file = zoo.model("MeanScaleHyperprior")
    tables = "network.gaussian_conditional._quantized_cdf"
    for key, change in {
        tables: lambda v: v * 2,
        "network.gaussian_conditional._cdf_length": lambda v: v + 10**6,
        "network.entropy_bottleneck._offset": lambda v: v[:2],
        "network.g_a.0.weight": lambda v: v * torch.nan,
        "network.g_a.0.bias": lambda v: v[:3],
        "network.more": lambda v: torch.zeros(1),
    }.items():
        tensors = {**file.tensors, key: change(file.tensors.get(key))}
        with pytest.raises(ModelFileError, match="its content is inconsistent"):
            _ = NetworkModel(ModelFile("lie", file.config, tensors, {})).network


def test_a_form_that_is_another_is_told(cat: NDArray[np.uint8]) -> None:
    class Odd(CompressionModel):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor) -> Any:
            return x

        def compress(self, x: torch.Tensor) -> Any:
            return [b"x"]

        def decompress(self, strings: Any, shape: Any) -> Any:
            return {}

    globals()["Odd"] = Odd
    description = {"class_path": f"{__name__}.Odd", "init_args": {}}
    with (
        trusting([__name__.partition(".")[0]]),
        pytest.raises(ModelFileError, match="does not return strings"),
    ):
        NetworkModel(freeze_network(build(description), description, "odd", {})).encode(cat)


ODD = """
import torch


class Plain(torch.nn.Module):
    def forward(self, x):
        return {"x_hat": x, "likelihoods": {"y": x}}

    def update(self):
        return True

    def compress(self, x):
        return {"strings": [[b"abc"]], "shape": x.shape[-2:]}

    def decompress(self, strings, shape):
        return {"x_hat": torch.zeros(1, 3, *shape)}


class Many(Plain):
    def compress(self, x):
        return {"strings": [[b"a"]] * 256, "shape": x.shape[-2:]}


class None_(Plain):
    def compress(self, x):
        return {"strings": [], "shape": x.shape[-2:]}


class Varying(Plain):
    def compress(self, x):
        return {"strings": [[b"a"]] * (1 + int(x.sum() > 0)), "shape": x.shape[-2:]}


class Content(Plain):
    def compress(self, x):
        return {"strings": [[b"a"]], "shape": (int(x.sum()), 2)}


class Fails(Plain):
    def compress(self, x):
        class Own(Exception):
            pass

        raise Own("two\\nlines")


class Reads(Plain):
    def compress(self, x):
        raise OSError("no such table")


class Noise(Plain):
    def decompress(self, strings, shape):
        return {"x_hat": torch.full((1, 3, *shape), torch.nan)}


class Nothing(Plain):
    def decompress(self, strings, shape):
        raise KeyError("x")
"""


def test_odd_networks_write_no_file_that_cannot_be_read(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "tests_odd.py").write_text(ODD)

    def compress(name: str) -> str:
        description = {"class_path": f"tests_odd.{name}", "init_args": {}}
        freeze_network(build(description), description, name, {}).save(Path(f"{name}.safetensors"))
        return f"compress cat.png -o {name}.tuc --model {name}.safetensors --trust tests_odd"

    for name, told in {
        "Many": "Many.compress makes 256 strings; it must be a number from 1 to 255",
        "None_": "None_.compress makes 0 strings",
        "Varying": "Varying.compress makes 2 strings; it must be a number from 1 to 255, the same for all",
        "Content": "Content: the shapes that it codes do not grow with the image",
        "Fails": "model Fails cannot code this image: two lines",
        "Reads": "model Reads cannot code this image: no such table",
    }.items():
        assert told in fails(compress(name), capsys)
        assert not Path(f"{name}.tuc").exists()
    for name, told in {
        "Noise": "makes values of the file that are no numbers",
        "Nothing": "the file cannot be decoded: no entry 'x'",
    }.items():
        assert cli.main(compress(name).split()) == 0
        decompress = f"decompress {name}.tuc -o {name}.png --model {name} --trust tests_odd"
        assert told in fails(decompress, capsys)
        assert not Path(f"{name}.png").exists()
    assert cli.main(compress("Plain").split()) == 0  # without a single weight
    line = "decompress Plain.tuc -o Plain.png --model Plain --trust tests_odd"
    assert cli.main(line.split()) == 0


@pytest.mark.parametrize("mode", CALLER_MODES)
def test_the_modes_of_the_caller_change_no_network(mode: str, cat: NDArray[np.uint8]) -> None:
    for name in ("MeanScaleHyperprior", "JointAutoregressiveHierarchicalPriors"):
        known = NetworkModel(zoo.model(name))
        data = known.encode(cat)
        with caller_mode(mode):
            model = NetworkModel(known.file)
            assert model.encode(cat) == data
            shown = model.decode(data)
        assert (shown == known.decode(data)).all()
