"""A plain installation codes images; what it lacks is named with the extra that brings it."""

import ast
import os
import re
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from lightning_tucodec.cli import EXTRAS

PACKAGE = "lightning-tucodec"
ROOT = Path(__file__).parents[1]


def closure(names: list[str]) -> set[str]:
    """Distributions that these need on this machine, themselves included."""
    found: set[str] = set()
    todo = [Requirement(name) for name in names]
    while todo:
        requirement = todo.pop()
        extras = {"", *requirement.extras}
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name in found and not requirement.extras:
            continue
        found.add(name)
        for text in metadata.requires(name) or []:
            needed = Requirement(text)
            marker = needed.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(needed)
    return found


def declared(extra: str | None = None) -> list[str]:
    """Requirements of pyproject.toml, the base's or an extra's."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = project["optional-dependencies"][extra] if extra else project["dependencies"]
    return [text for text in texts if Requirement(text).name != PACKAGE] + [
        inner
        for text in texts
        if Requirement(text).name == PACKAGE
        for other in sorted(Requirement(text).extras)
        for inner in declared(other)
    ]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that holds this package and what its base requires, by links."""
    folder = tmp_path_factory.mktemp("plain")
    venv.create(folder, symlinks=True)
    site = next(folder.glob("lib/python3*/site-packages"))
    (site / "here.pth").write_text(str(ROOT))
    for name in closure(declared()):
        files = metadata.distribution(name).files or []
        base = Path(str(metadata.distribution(name).locate_file("")))
        for top in {Path(str(file)).parts[0] for file in files} - {"..", "__pycache__"}:
            target = site / top
            if not target.exists() and not target.is_symlink():
                target.symlink_to(base / top)
    return folder / "bin" / "python"


def call(python: Path, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONNOUSERSITE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [str(python), "-m", "lightning_tucodec.cli", *words]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_a_plain_installation_codes(plain: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.linear_gradient("L").resize((64, 48)).convert("RGB").save(tmp_path / "a.png")
    for words in (
        ["compress", "a.png", "-o", "a.tuc", "--json"],
        ["decompress", "a.tuc", "-o", "b.png"],
        ["info", "a.tuc"],
        ["models"],
    ):
        done = call(plain, *words, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
    with Image.open(tmp_path / "b.png") as decoded:
        assert decoded.size == (64, 48)


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (["fit"], "train"),
        (["evaluate", "a.png", "--codec", "vvc:qp=40", "-o", "r.json"], "h266"),
        (["shards", "build", ".", "--out", "s"], "data"),
        (["demo", "--out", "d"], "demo"),
        (["sweep", "plan", "s.yaml"], "train"),
    ],
)
def test_what_is_missing_is_named_with_its_extra(
    plain: Path, tmp_path: Path, words: list[str], extra: str
) -> None:
    from PIL import Image

    Image.effect_noise((300, 300), 60).convert("RGB").save(tmp_path / "a.png")
    (tmp_path / "s.yaml").write_text("name: s\nstages: {a: {config: c.yaml}}\n")
    (tmp_path / "c.yaml").write_text("model: {lmbda: 256}\n")
    done = call(plain, *words, cwd=tmp_path)
    assert done.returncode == 1
    assert f"pip install 'lightning-tucodec[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("tucodec: ") == 1


def test_every_import_is_required_or_has_an_extra() -> None:
    """Whatever the code imports comes with the base or stands in `EXTRAS`, with an extra that brings it."""
    by_module = metadata.packages_distributions()
    base = closure(declared())
    for path in [
        *(ROOT / "lightning_tucodec").rglob("*.py"),
        *(ROOT / "data_pipelines").rglob("*.py"),
    ]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            for module in {name.partition(".")[0] for name in names} - sys.stdlib_module_names:
                if module in ("lightning_tucodec", "data_pipelines", "resource"):
                    continue
                owners = {re.sub(r"[-_.]+", "-", name).lower() for name in by_module[module]}
                if not owners & base:
                    assert owners & closure(declared(EXTRAS[module])), (path, module)
