"""NetworkModule: every recipe of experiments/zoo at micro size, parity with CompressAI, bad inputs."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from compressai.losses import RateDistortionLoss
from compressai.models import FactorizedPrior
from compressai.optimizers import net_aux_optimizer
from hits import kill_at_step, start, wait

from lightning_tucodec.bench.complexity import of_preset
from lightning_tucodec.cli import main
from lightning_tucodec.codecs.library import NetworkModel, load_any
from lightning_tucodec.codecs.network.build import build
from lightning_tucodec.io.images import read_image
from lightning_tucodec.nn.codec import TucodecVAE, config_to_dict
from lightning_tucodec.nn.complexity import SIDE, kmac_per_pixel
from lightning_tucodec.nn.losses import make_loss
from lightning_tucodec.training.network import NetworkOutput, _spare_reads
from lightning_tucodec.training.runs.folder import read_metrics
from lightning_tucodec.training.runs.weights import network_weights
from lightning_tucodec.training.vae import resolve_codec
from tests.campaigns import compressai_parity as parity
from tests.support import MICRO, photo
from tests.training.test_fit import runs, same, state, without_time

ZOO = sorted((Path(__file__).parents[2] / "experiments" / "zoo").glob("*.yaml"))
STEPS = 4


def micro(recipe: Path) -> dict[str, Any]:
    """A recipe with few channels, four steps, and a validation after every second."""
    values: dict[str, Any] = yaml.safe_load(recipe.read_text())
    arguments = values["model"]["init_args"]["network"]["init_args"]
    arguments["N"] = 8
    if "M" in arguments:
        arguments["M"] = 12
    if recipe.stem.startswith("elic"):
        arguments["groups"] = [2, 4, 6]
    if "discriminator_widths" in values["model"]["init_args"]:
        values["model"]["init_args"]["discriminator_widths"] = [8, 8]
    values["data"].update(batch_size=2, crop=64)
    values["trainer"].update(
        accelerator="cpu", devices=1, max_steps=STEPS, val_check_interval=2, log_every_n_steps=1
    )
    return values


def command(
    folder: Path, values: dict[str, Any], shards: Path, val: Path | None = None
) -> list[str]:
    folder.mkdir()
    values["run"]["runs_dir"] = str(folder / "runs")
    values["data"]["shards"] = str(shards)
    if val is not None:
        values["data"]["val_images"] = str(val)
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return ["fit", "--config", str(folder / "config.yaml")]


@pytest.mark.parametrize("recipe", ZOO, ids=lambda path: path.stem)
def test_a_family_is_trained_killed_resumed_exported_and_coded(
    recipe: Path,
    tmp_path: Path,
    shard_folder: Path,
    val_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    straight = command(tmp_path / "straight", micro(recipe), shard_folder, val_folder)
    hit = command(tmp_path / "hit", micro(recipe), shard_folder, val_folder)
    assert main(straight) == 0
    assert wait(start([*hit, "--run.checkpoint_minutes", "0"], kill_at_step(3))) == -9
    assert main(hit) == 0
    (one,), (other,) = runs(tmp_path / "straight"), runs(tmp_path / "hit")
    first, second = state(one), state(other)
    for part in ("state_dict", "optimizer_states", "tucodec"):
        assert same(first[part], second[part]), part
    rows = without_time(read_metrics(one / "metrics.jsonl"))
    assert without_time(read_metrics(other / "metrics.jsonl")) == rows
    assert first["tucodec"]["opt_step"] == STEPS
    assert first["tucodec"]["images_seen"] == 2 * STEPS
    validations = [row for row in rows if "val/psnr" in row]
    assert [row["opt_step"] for row in validations] == [2, 4]
    assert all(0 < row["val/bpp"] < row["val/real_bpp"] for row in validations)
    assert all(
        row["val/channels_used"] + row["val/channels_dead"] in (8, 12) for row in validations
    )

    model, tuc, png = (tmp_path / name for name in ("m.safetensors", "cat.tuc", "cat.png"))
    assert main(["export", str(other), "-o", str(model)]) == 0
    image = str(val_folder / "cat.png")
    monkeypatch.setenv("TUCODEC_MODELS", str(tmp_path))
    quality = ["--quality", "2.5"] if recipe.stem.endswith("vbr") else []
    recon = ["--recon", str(tmp_path / "shown.png")]
    assert main(["compress", image, "-o", str(tuc), "--model", str(model), *recon, *quality]) == 0
    assert main(["decompress", str(tuc), "-o", str(png)]) == 0
    assert (read_image(png) == read_image(tmp_path / "shown.png")).all()
    loaded = load_any(model)
    assert isinstance(loaded, NetworkModel)
    assert loaded.card["opt_step"] == STEPS
    weights = network_weights(second)
    assert all(
        torch.equal(loaded.network.state_dict()[k], v) for k, v in weights.items() if v.numel()
    )


# --- Parity with CompressAI -------------------------------------------------------------------------


@pytest.mark.filterwarnings(
    "ignore:The number of training batches", "ignore:You defined a `validation_step`"
)
@pytest.mark.parametrize("name", ["FactorizedPrior", "MeanScaleHyperprior"])
def test_a_slice_of_the_parity_with_compressai(name: str) -> None:
    module, differences = parity.trained(name, 4)
    assert len(differences) == 4
    assert max(differences) < 1e-5
    image = photo("coffee.png", 192, 192)
    (bpp, psnr), (own_bpp, own_psnr) = parity.evaluated(module, name, image)
    header = 8 * 40 / 192**2  # of the container
    assert bpp < own_bpp < bpp + header
    assert own_psnr == pytest.approx(psnr, abs=0.01)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(2, 8), (2, 8, 3), (2, 8, 4, 3)])
def test_the_factorised_prior_is_compressais_to_the_bit(
    shape: tuple[int, ...], training: bool
) -> None:
    theirs = parity.pair("FactorizedPrior")[1].entropy_bottleneck
    theirs = type(theirs)(shape[1]).train(training)
    own = copy.deepcopy(torch.nn.ModuleList([theirs]))
    _spare_reads(own)
    assert "forward" in vars(own[0])
    found = []
    for bottleneck in (theirs, own[0], copy.deepcopy(own)[0]):
        torch.manual_seed(0)
        x = torch.randn(shape, requires_grad=True)
        outputs, likelihoods = bottleneck(x)
        (outputs.square().sum() + likelihoods.log().sum()).backward()
        found.append([outputs, likelihoods, x.grad, *(p.grad for p in bottleneck.parameters())])
        assert outputs.is_contiguous()
    for one in found[1:]:
        assert same(found[0], one)


def test_losses_are_compressais() -> None:
    torch.manual_seed(0)
    x, x_hat = torch.rand(2, 3, 192, 192), torch.rand(2, 3, 192, 192)
    likelihoods = {"y": torch.rand(2, 4, 12, 12), "z": torch.rand(2, 4, 3, 3)}
    output = {"x_hat": x_hat, "likelihoods": likelihoods}
    for metric in ("mse", "ms-ssim"):
        theirs = RateDistortionLoss(lmbda=0.5, metric=metric)(output, x)
        terms = make_loss(f"compressai-{metric}", 0.5)(NetworkOutput(**output), x)
        assert float(terms.loss) == pytest.approx(float(theirs["loss"]), rel=1e-5)
        assert float(terms.bpp_y + terms.bpp_z) == pytest.approx(
            float(theirs["bpp_loss"]), rel=1e-5
        )


def test_the_optimisers_are_compressais() -> None:
    module, twin = parity.pair("MeanScaleHyperprior")
    conf = {"net": {"type": "Adam", "lr": 1e-4}, "aux": {"type": "Adam", "lr": 1e-3}}
    expected = net_aux_optimizer(twin, conf)
    for own, theirs in zip(module.configure_optimizers(), expected.values(), strict=True):
        shapes = [[p.shape for p in one.param_groups[0]["params"]] for one in (own, theirs)]
        assert shapes[0] == shapes[1]
        assert own.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]


# --- Bad input --------------------------------------------------------------------------------------

BAD = """
from compressai.models import MeanScaleHyperprior


class Half:
    pass


class NoCoder(__import__("torch").nn.Module):
    def forward(self, x):
        return {}


class Tensors(MeanScaleHyperprior):
    def forward(self, x):
        return x


class Silent(MeanScaleHyperprior):
    def forward(self, x):
        return {"x_hat": x, "likelihoods": {}}


class Lists(MeanScaleHyperprior):
    def forward(self, x):
        return {"x_hat": x, "likelihoods": {"y": [1, 2]}}


class Fails(MeanScaleHyperprior):
    def forward(self, x):
        raise OSError("no table")


class Branches(MeanScaleHyperprior):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


class Auxiliary(MeanScaleHyperprior):
    def aux_loss(self):
        return None


class Breaks(MeanScaleHyperprior):
    def __init__(self, N):
        raise RuntimeError("two\\nlines")


class Cut(MeanScaleHyperprior):
    def decompress(self, strings, shape):
        return {"x_hat": super().decompress(strings, shape)["x_hat"][..., 1:]}
"""


def bad_networks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `BAD` a module that can be imported."""
    (folder / "bad_networks.py").write_text(BAD)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "bad_networks", raising=False)


@pytest.mark.parametrize(
    ("network", "more", "told"),
    [
        ({"class_path": "bad_networks.Half"}, {}, "bad_networks.Half is no network"),
        ({"class_path": "bad_networks.NoCoder"}, {}, "bad_networks.NoCoder has no method compress"),
        ({"class_path": "bad_networks.Absent"}, {}, "bad_networks.Absent cannot be imported"),
        ({"class_path": "absent.X"}, {}, "absent.X cannot be imported"),
        ({"class_path": "bad_networks.Breaks", "init_args": {"N": 3}}, {}, "(N=3): two lines"),
        ({"init_args": {"N": 8, "M": 8}}, {}, "a network is class_path and init_args"),
        (
            {"class_path": "compressai.models.MeanScaleHyperprior"},
            {},
            "does not take these arguments (none)",
        ),
        (
            {"class_path": "bad_networks.Tensors", "init_args": {"N": 8, "M": 8}},
            {},
            "Tensors.forward does not return x_hat and likelihoods",
        ),
        (
            {"class_path": "bad_networks.Silent", "init_args": {"N": 8, "M": 8}},
            {},
            "Silent.forward does not return x_hat and likelihoods as CompressAI's networks do (there are no",
        ),
        (
            {"class_path": "bad_networks.Lists", "init_args": {"N": 8, "M": 8}},
            {},
            "(likelihoods['y'] is no tensor of 2 images)",
        ),
        (
            {"class_path": "bad_networks.Fails", "init_args": {"N": 8, "M": 8}},
            {},
            "Fails.forward fails on 2×3×64×64: OSError: no table (bad_networks.py:",
        ),
        (
            {"class_path": "bad_networks.Auxiliary", "init_args": {"N": 8, "M": 8}},
            {},
            "Auxiliary.aux_loss returns no scalar",
        ),
        (
            {"class_path": "bad_networks.Branches", "init_args": {"N": 8, "M": 8}},
            {"compile": True},
            "model.compile: this training step is no graph: Data-dependent branching (bad_networks.py:",
        ),
        (
            {"class_path": "compressai.models.ScaleHyperpriorVbr", "init_args": {"N": 8, "M": 8}},
            {"compile": True, "lmbda": None},
            "model.compile: a variable-rate network has a graph for each level; leave it out",
        ),
        (
            {"class_path": "compressai.models.MeanScaleHyperprior", "init_args": {"N": 8, "M": 8}},
            {"lmbda": None},
            "model.lmbda is missing",
        ),
        (
            {"class_path": "compressai.models.ScaleHyperpriorVbr", "init_args": {"N": 8, "M": 8}},
            {},
            "model.lmbda: this network has its own λ for each level",
        ),
        (
            {"class_path": "compressai.models.MeanScaleHyperprior", "init_args": {"N": 8, "M": 8}},
            {"recipe": "compressai-psnr"},
            "recipe 'compressai-psnr' is unknown",
        ),
        (
            {"class_path": "compressai.models.MeanScaleHyperprior", "init_args": {"N": 8, "M": 8}},
            {"recipe": "compressai-ms-ssim"},
            "needs crops of at least 192 pixels",
        ),
    ],
)
def test_bad_networks_are_one_line(
    network: dict[str, Any],
    more: dict[str, Any],
    told: str,
    tmp_path: Path,
    shard_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad_networks(tmp_path, monkeypatch)
    values = micro(ZOO[0])
    options = {"network": network, "lmbda": 0.01, **more}
    values["model"]["init_args"] = {k: v for k, v in options.items() if v is not None}
    words = command(tmp_path / "run", values, shard_folder)
    capsys.readouterr()
    assert main(words) in (1, 2)
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("run ")]
    assert len(lines) == 1
    assert told in lines[0]


def test_a_class_alone_does_not_replace_a_network(
    tmp_path: Path, shard_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command(tmp_path / "run", micro(ZOO[0]), shard_folder)
    for option in ("--model.network.class_path", "--model.init_args.network.class_path"):
        assert main([*words, option, "compressai.models.FactorizedPrior"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "model.network: another class is named together with its arguments" in line
    other = line.partition("--model.network '")[2].rstrip("'").replace("128", "8")
    assert main([*words, "--model.network", other.replace("192", "8")]) == 0


def test_a_network_that_does_not_decode_its_files_is_told_at_the_first_validation(
    tmp_path: Path,
    shard_folder: Path,
    val_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad_networks(tmp_path, monkeypatch)
    values = micro(next(path for path in ZOO if path.stem == "mean_scale_hyperprior"))
    values["model"]["init_args"]["network"]["class_path"] = "bad_networks.Cut"
    assert main(command(tmp_path / "run", values, shard_folder, val_folder)) == 0
    told = capsys.readouterr().err
    assert "step 2: no real files, Cut does not decode what it codes: the network makes (1," in told


def test_a_warm_start_is_of_the_same_network(
    tmp_path: Path, shard_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = next(path for path in ZOO if path.stem == "mean_scale_hyperprior")
    values = micro(recipe)
    values["trainer"]["max_steps"] = 1
    assert main(command(tmp_path / "one", values, shard_folder)) == 0
    (run,) = runs(tmp_path / "one")
    model = tmp_path / "m.safetensors"
    assert main(["export", str(run), "-o", str(model)]) == 0
    for source in (str(run), str(model)):
        words = command(tmp_path / Path(source).stem, values, shard_folder)
        assert main([*words, "--run.init_from", source]) == 0
        arguments = "--model.init_args.network.init_args.N"
        capsys.readouterr()
        assert main([*words, "--run.init_from", source, arguments, "6"]) == 1
        assert "another network (differs in " in capsys.readouterr().err.splitlines()[-1]


def test_an_export_names_what_differs_from_the_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where a class was changed after its training."""
    network = TucodecVAE(resolve_codec("tiny", MICRO))
    description = {"class_path": "compressai.models.FactorizedPrior", "init_args": {"N": 8, "M": 6}}
    cases = {
        "own": (network, {"codec": config_to_dict(network.config)}),
        "theirs": (build(description), {"network": description}),
    }
    for name, (trained, described) in cases.items():
        weights = {f"network.{k}": v for k, v in trained.state_dict().items()}
        key = next(key for key, value in weights.items() if value.ndim == 4)
        content = {"tucodec": {"opt_step": 3, "images_seen": 6, **described}}
        for change in ({key: weights[key][:1]}, {"network.more": torch.zeros(1)}):
            torch.save({"state_dict": {**weights, **change}, **content}, tmp_path / f"{name}.ckpt")
            out = tmp_path / f"{name}.safetensors"
            assert main(["export", str(tmp_path / f"{name}.ckpt"), "-o", str(out)]) == 1
            (line,) = capsys.readouterr().err.splitlines()
            (differing,) = change
            named = differing.removeprefix("network.")
            assert line.endswith(f"weights of another network (differs in {named}, …)")
            assert not out.exists()


def test_the_small_recipe_decodes_with_as_many_operations_as_tiny() -> None:
    recipe = next(path for path in ZOO if path.stem == "mean_scale_hyperprior_small")
    network: Any = build(yaml.safe_load(recipe.read_text())["model"]["init_args"]["network"]).eval()
    with torch.no_grad():
        y = network.g_a(torch.rand(1, 3, SIDE, SIDE))
        theirs = kmac_per_pixel(lambda: network.g_s(y))
    assert theirs == pytest.approx(of_preset("tiny").decoder, rel=0.01)


def test_a_nan_that_no_weight_has_a_part_in_stops_the_run(
    tmp_path: Path,
    shard_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its gradients are finite."""
    forward = FactorizedPrior.forward

    def spoilt(self: FactorizedPrior, x: torch.Tensor) -> dict[str, Any]:
        output: dict[str, Any] = forward(self, x)
        output["likelihoods"]["constant"] = torch.full_like(x, torch.nan)
        return output

    monkeypatch.setattr(FactorizedPrior, "forward", spoilt)
    recipe = next(path for path in ZOO if path.stem == "factorized_prior")
    words = command(tmp_path / "a", micro(recipe), shard_folder)
    capsys.readouterr()
    assert main(words) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "tucodec" in line]
    assert "loss or gradient is not finite at optimiser step 0; state saved in" in lines[-1]
