"""Every path that a user can give, as an argument or in a configuration, may begin with ~ or hold $NAME."""

import argparse
import inspect
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_tucodec.cli import build_parser, main
from lightning_tucodec.codecs import library, registry
from lightning_tucodec.io.files import expanded
from lightning_tucodec.training.configuration import RunConfig, resolve
from lightning_tucodec.training.data import PatchDataModule
from lightning_tucodec.training.gan import GANCodec, GANNetwork
from lightning_tucodec.training.network import NetworkModule
from lightning_tucodec.training.postfilter import PostFilterModule, PrecodedDataModule
from lightning_tucodec.training.runs.identity import expand_locations, locations
from lightning_tucodec.training.vae import VAE

NO_PATHS = {
    # Codecs' specifications: see test_models_in_specifications.
    "allocate --candidate", "bench parts --codec", "evaluate --codec", "shards precode --codec",
    # Values inside, which are expanded as those of a configuration.
    "sweep plan --set", "sweep submit --set", "sweep run --set", "doctor options",
    # Names and texts.
    "bench h266 --preset", "compare --anchor", "compare --title", "compress --preset",
    "evaluate --metrics", "export --name", "import --args", "import --name",
    "import --network", "shards build --licence", "sweep retry tasks",
    "sweep resolve task",
}  # fmt: skip
"""Arguments that take a text which is no path."""

NO_LOCATIONS = {
    "run": {"name", "project", "group", "job_type", "tags"},
    "model": {"recipe", "preset", "size", "codec", "network", "frozen", "init_parts"},
    "data": set[str](),
}
"""Options of a configuration that hold texts which are no path."""

GIVEN = "~/$TUCODEC_TEST/$UNKNOWN"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TUCODEC_TEST", "inner folder")
    monkeypatch.delenv("UNKNOWN", raising=False)
    (tmp_path / "inner folder").mkdir()
    return tmp_path


def parsers(
    parser: argparse.ArgumentParser, name: str = ""
) -> Iterator[tuple[str, argparse.Action]]:
    """Every action that takes a value, with the command that it belongs to."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, inner in action.choices.items():
                yield from parsers(inner, f"{name}{word} ")
        elif action.nargs != 0:
            yield f"{name}{(action.option_strings or [action.dest])[-1]}", action


def test_every_argument_is_expanded_or_no_path(home: Path) -> None:
    texts = set()
    for name, action in parsers(build_parser()):
        if action.choices:
            continue
        try:
            value = action.type(GIVEN) if callable(action.type) else GIVEN
        except (ValueError, argparse.ArgumentTypeError):
            continue  # a number
        if str(value) != f"{home}/inner folder/$UNKNOWN":
            assert str(value) == GIVEN
            if action.dest != "trust":  # the name of a package, in many commands
                texts.add(name)
    assert texts == NO_PATHS


def test_every_entry_of_a_configuration_is_expanded_or_no_path(home: Path) -> None:
    classes: dict[str, list[typing.Any]] = {
        "run": [RunConfig],
        "model": [VAE, GANCodec, GANNetwork, PostFilterModule, NetworkModule],
        "data": [PatchDataModule, PrecodedDataModule],
    }
    for group, kinds in classes.items():
        for kind in kinds:
            hints = typing.get_type_hints(kind if group == "run" else kind.__init__)
            named = {
                parameter.name
                for base in kind.__mro__
                for parameter in inspect.signature(base.__init__).parameters.values()
                if "str" in str(hints.get(parameter.name, parameter.annotation))
            }
            config = {other: {} for other in classes} | {group: dict.fromkeys(named, GIVEN)}
            expand_locations(config)
            kept = {name for name, value in config[group].items() if value == GIVEN}
            assert kept <= NO_LOCATIONS[group]
            found = {name for _, name in locations(config)}
            assert named - kept == found
            assert all(config[group][name] == f"{home}/inner folder/$UNKNOWN" for name in found)


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("doctor --config {}", 1),
        ("doctor --script {}", 1),
        ("export model.safetensors -o ~/out.safetensors --card {}", 1),
        ("fit --config {}", 2),
        ("fit --config={}", 2),
        ("validate --config {}", 2),
        ("sweep plan {}", 1),
        ("sweep plan sweep.yaml", 1),
        ("sweep run {}", 1),
        ("info {}", 1),
    ],
)
def test_what_is_missing_is_named_in_full(
    line: str,
    status: int,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(home)
    Path("sweep.yaml").write_text(f"name: a\nstages: {{b: {{config: {GIVEN}}}}}\n")
    Path("model.safetensors").write_bytes(library.find("tiny-mse-1").read_bytes())
    assert main([word.format(GIVEN) for word in line.split()]) == status
    said = "".join(capsys.readouterr())
    assert f"{home}/inner folder/$UNKNOWN" in said
    assert "~" not in said.replace("~/out", "")
    assert not (home / "~").exists()


def test_models_in_specifications(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tiny-mse-1", "vvc-postfilter"):
        target = home / "inner folder" / f"own,{name}.safetensors"
        target.write_bytes(library.find(name).read_bytes())
    model = "~/$TUCODEC_TEST/own,tiny-mse-1.safetensors"
    assert registry.codec(f"{model}:effort=2").name == "tiny-mse-1:effort=2"
    assert registry.files(f"{model}:effort=2") == [expanded(model)]
    path = "$HOME/$TUCODEC_TEST/own,vvc-postfilter.safetensors"
    assert registry.model_of(registry.codec(f"vvc+postfilter:qp=40,filter={path},turn=0"))
    monkeypatch.setenv("TUCODEC_MODELS", "~/$TUCODEC_TEST")
    assert library.find("own,tiny-mse-1") == home / "inner folder" / "own,tiny-mse-1.safetensors"


def test_values_of_a_sweep_are_expanded(home: Path) -> None:
    config = resolve({"run": {"runs_dir": GIVEN}, "data": {"shards": GIVEN, "batch_size": 1}})
    assert config["run"]["runs_dir"] == config["data"]["shards"] == expanded(GIVEN)


def test_a_file_that_exists_keeps_its_name(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    Path("price $HOME.png").touch()
    assert expanded("price $HOME.png") == "price $HOME.png"
    assert expanded("./$HOME.png") == f"./{home}.png"
