"""README and docs say only what is there: their commands and Python run, every link and file exists.

Commands run in one folder, page after page, as a reader would type them: `_SMALL` makes them short, and
`_NAMES` puts photographs of this machine in the place of the reader's. What cannot run here stands in
`_ELSEWHERE`, with the reason, and is parsed instead.
"""

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from lightning_tucodec import cli
from tests.support import photo

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").rglob("*.md"))
README = ROOT / "README.md"
PAGES = [README, *DOCS, *sorted((ROOT / "experiments").rglob("*.md"))]
SHELL = ("", "sh", "bash", "console")

_ELSEWHERE = {
    r"make (demo|test)": "minutes; continuous integration runs both",
    r"apt-get|slurm/localcluster/|source |squeue": "a Slurm: tests/cluster",
    r"sbatch ": "a Slurm: tests/cluster",
    r"tucodec bench codec --large": "24 megapixels, minutes",
    r"PSNR_CODECS=": "the images of CLIC 2019",
    r"tucodec .*\bclic(/|40|\.json)": "the images of CLIC 2020",
}
"""What does not run here, by how it begins, and why."""

_NAMES = {
    "PHOTOS": "photos", "TEST_PHOTOS": "photos", "IMAGES": "photos", "KODAK": "photos",
    "VALIDATION_PHOTOS": "validation", "photos/": "photos", "kodak/": "validation",
    "shards/": "shards/page",
    "s3://b/shards": "shards/train", "s3://b/runs": "mirror",
    "out/ssim": "submission", "out/psnr": "submission", "out/40db": "transparent",
    "sweeps/tucodecssim-…": "sweeps/tiny_ssim-…",
    "sweeps/tucodecssim-0123456789ab": "sweeps/tiny_ssim-…",
}  # fmt: skip
"""A reader's names, and what they are here."""

_FIT = "--trainer.max_steps 2 --trainer.val_check_interval 2 --data.batch_size 2 --run.threads 1"
_SMALL = {
    "allocate": "--max-bpp 6 --workers 1",
    "clic verify": "--max-bpp 6",
    "bench codec": "--models tiny-mse-2 --bpp 0.5 --size 64 64 --repeats 1 --peers",
    "bench entropy": "--models tiny-mse-2 --bpp 0.5 --size 64 64 --repeats 1 --peers",
    "bench h266": "--preset faster --qp 22 30 38 46 --bpp 1 --workers 1",
    "compare": "--samples 10 --pictures 1",
    "compress photo.png -o out/ --model vvc": "--preset faster",
    "compress photo.png -o bare/ --model vvc": "--preset faster",
    "evaluate": "--workers 1",
    "fit": _FIT,
    "shards build": "--patch 192 --count 4 --duplicate-bits -1 --scales 1 --workers 1",
    "shards precode": "--workers 1",
    "sweep run": "--set trainer.max_steps=1 --set data.batch_size=1",
    "wandb-sync": "--offline",
}
"""Options that come after a page's own, so that a command ends in seconds."""

_STATUS = {"doctor": {0, 1}, "decompress damaged.tuc": {1}}
"""Where another exit status than 0 is what the page says."""


@dataclass(frozen=True)
class Block:
    """Code on a page.

    Attributes:
        language: of a fence; empty for indented code.
        text: its lines.
        title: the last line of text before it.
    """

    language: str
    text: str
    title: str


def blocks(page: Path) -> Iterator[Block]:
    """Fenced and indented code of a page."""
    lines: list[str] | None = None
    language = title = ""
    indented: list[str] = []
    for raw in [*page.read_text(encoding="utf-8").splitlines(), ""]:
        if lines is None and not raw.lstrip().startswith("```"):
            if raw.startswith("    ") and not indented and not title.startswith(("-", "1.")):
                indented = [raw.strip()]
            elif raw.startswith("    ") and indented:
                indented.append(raw.strip())
            elif indented:
                yield Block("", "\n".join(indented), title)
                indented = []
            if raw.strip() and not indented:
                title = raw.strip()
        elif lines is None:
            lines, language = [], raw.strip().removeprefix("```")
        elif raw.lstrip().startswith("```"):
            yield Block(language, "\n".join(lines), title)
            lines = None
        else:
            lines.append(raw)


def commands(page: Path) -> list[str]:
    """Lines of shell on a page, continued ones joined; what they print is left out."""
    found = []
    for block in blocks(page):
        if block.language not in SHELL:
            continue
        text = re.sub(r"\\\n\s*", "", block.text)
        prompts = [line.strip() for line in text.splitlines() if line.strip().startswith("$ ")]
        plain = [line.strip() for line in text.splitlines() if _is_command(line.strip())]
        found += [line.removeprefix("$ ") for line in prompts] or plain
    return found


def _is_command(line: str) -> bool:
    """Whether a line without a prompt is one."""
    own = ("tucodec ", "make ", "sbatch ", "slurm/", "experiments/", "python ", "pip ", "bash ")
    return re.sub(r"^(\w+=(\"[^\"]*\"|\S*) )+", "", line).startswith(own)


COMMANDS = [(page, line) for page in PAGES for line in commands(page)]


def elsewhere(line: str) -> bool:
    """Whether a command is one of those that cannot run here."""
    return any(re.match(pattern, line) for pattern in _ELSEWHERE)


def expand(word: str) -> list[str]:
    """A shell's braces: `a={1,2},b` is two words."""
    parts = re.split(r"\{([^{}]*)\}", word)
    choices = [part.split(",") if index % 2 else [part] for index, part in enumerate(parts)]
    return ["".join(choice) for choice in itertools.product(*choices)]


def words_of(line: str) -> tuple[dict[str, str], list[str]]:
    """Variables before a command, and its words without comment, braces expanded."""
    words = [w for word in shlex.split(line, comments=True) for w in expand(word)]
    variables = dict(
        word.split("=", 1) for word in itertools.takewhile(re.compile(r"\w+=").match, words)
    )
    return variables, words[len(variables) :]


def here(word: str) -> list[str]:
    """A page's word in this workspace: its own names, and the files behind `…`, `*` and made-up ids."""
    if word.startswith("wandb:") or word == "--memory":
        return []  # a server (tests/report has a stub of it), and a process a codec (tests/test_evaluate.py)
    word = _NAMES.get(word, word)
    pattern = re.sub(r"(?<=-)(0123456789ab|ba9876543210)$", "…", word)
    if "…" in pattern or "*" in pattern:
        found = sorted(Path().glob(pattern.replace("…", "*")), key=os.path.getmtime)
        assert found, f"nothing here is called {word}"
        if "…" in pattern:
            return [str(found[0 if "ba98" in word else -1])]
        return [str(path) for path in found[:2]]
    return [word]


def tucodec(words: list[str]) -> None:
    """One command of the package, made short, in this process."""
    small = next((v for k, v in _SMALL.items() if " ".join(words).startswith(k)), "")
    if words[0] == "fit" and "tucodecpsnr_postfilter" in " ".join(words):
        small += " --data.init_args.val_images precoded/train"
    called = [*words, *small.split()]
    expected = next((v for k, v in _STATUS.items() if " ".join(words).startswith(k)), {0})
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status: Any = cli.main(called)
        except SystemExit as end:
            status = end.code
    assert status in expected, f"tucodec {shlex.join(called)}\n{err.getvalue()[-3000:]}"


def clear(page: Path) -> None:
    """Remove what earlier pages have left where this one writes; no command replaces a file unasked."""
    for line in commands(page):
        _, words = words_of(line)
        if (
            words[1:2] in (["compress"], ["decompress"], ["export"], ["import"], ["compare"])
            or "stats" in words
        ):
            out = Path(words[words.index("-o") + 1])
            inside = [f for kind in ("tuc", "png") for f in out.glob(f"*.{kind}")]
            beside = out.parent.glob(f"{out.stem}-*psnr.*"), out.parent.glob(f"{out.stem}-*ssim.*")
            for file in itertools.chain([out] if out.is_file() else [], inside, *beside):
                file.unlink()


def run(line: str) -> None:
    """One line of a page, in the current folder."""
    variables, words = words_of(line)
    words = [w for word in words for w in here(word)]
    if words[:2] == ["tucodec", "shards"]:
        words = ["training" if word == "photos" else word for word in words]
    if words[:3] == ["tucodec", "bench", "h266"]:  # a dozen codings an image and QP
        words = ["photos/coffee.png" if word == "photos" else word for word in words]
    # The preset medium takes three times as long; kodak.json is compared by the name `vvc`.
    if words[1:2] in (["evaluate"], ["allocate"]) and "kodak.json" not in words:
        words = [re.sub(r"^(vvc(\+postfilter)?:qp=\d+)$", r"\1,preset=faster", w) for w in words]
    if words[0] == "tucodec":
        with pytest.MonkeyPatch.context() as patch:
            for path in filter(None, variables.get("PYTHONPATH", "").split(":")):
                patch.syspath_prepend(str(Path(path).resolve()))
            tucodec(words[1:])
        return
    dry = [] if "--dry-run" in words else ["--dry-run"]
    if words[0].startswith("experiments/clic2019/"):
        dry = ["--slurm", "2", "--dry-run"]
    assert words[0].startswith(("slurm/", "experiments/", "bash")), line
    environment = {**os.environ, **variables, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*words, *dry], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, f"{line}\n{done.stderr}"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A reader's folder after the README's commands, with two trainings, a sweep and a submission."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "slurm").symlink_to(ROOT / "slurm")
    shutil.copytree(ROOT / "experiments", folder / "experiments")
    gan = folder / "experiments" / "tiny_gan.yaml"
    # The game with an open gate: else its one step of the codec comes after hundreds of the discriminator.
    text = gan.read_text().replace("    ema:", "    gate_lower: 0.0\n    gate_upper: 2.0\n    ema:")
    assert "gate" in text
    gan.write_text(text)
    for place, names, width, height in (
        ("training", ("chelsea.png", "coffee.png"), 208, 200),
        ("photos", ("chelsea.png", "coffee.png"), 96, 80),
        ("validation", ("rocket.jpg",), 101, 75),
    ):
        (folder / place).mkdir()
        for name in names:
            shown = Image.fromarray(photo(name, width, height))
            shown.save(folder / place / f"{Path(name).stem}.png")
    Image.fromarray(photo("astronaut.png", 100, 75)).save(folder / "photo.png")
    curve = {"bpp": [0.2, 0.8, 2, 6], "psnr-rgb": [25, 29, 34, 44]}
    (folder / "published").mkdir()
    for place, name in (("vtm.json", "VTM"), ("published/jpeg.json", "JPEG")):
        (folder / place).write_text(json.dumps({"name": name, "results": curve}))
    (folder / "job.sh").write_text("#SBATCH --requeue --signal=B:USR1@600\nsrun tucodec fit\n")
    with pytest.MonkeyPatch.context() as patch, chdir(folder):
        for name in ("CONFIG", "CACHE", "DATA"):
            patch.setenv(f"WANDB_{name}_DIR", str(folder / "wandb"))
        patch.delenv("WANDB_API_KEY", raising=False)
        patch.setenv("NETRC", str(folder / "netrc"))
        own = commands(README)
        status = next(line for line in own if "sweep status" in line)
        own.remove(status)  # of the sweep that the page on the game trains
        for line in [*own, *commands(ROOT / "docs" / "gan.md"), status]:
            if not elsewhere(line):
                run(line)
        yield folder


def test_every_page_is_read() -> None:
    assert len(COMMANDS) > 40
    assert len([line for _, line in COMMANDS if elsewhere(line)]) < len(COMMANDS) / 4
    for pattern in _ELSEWHERE:
        assert any(re.match(pattern, line) for _, line in COMMANDS), pattern
    assert expand("vvc:qp={1,2},x={a,b}")[1] == "vvc:qp=1,x=b"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_code_run(page: Path, workspace: Path) -> None:
    del workspace  # the current folder
    if page.name != "README.md" or page.parent.name == "clic2019":
        clear(page)
    for block in blocks(page):
        name = re.search(r"`([\w/]+\.(?:py|yaml))`[^`]*:$", block.title)
        if name:
            Path(name[1]).write_text(block.text + "\n")
        elif block.language == "yaml":
            assert yaml.safe_load(block.text)
        elif block.language == "python":
            run_python(block.text)
    if (
        page.name not in ("README.md", "gan.md") or page.parent.name == "clic2019"
    ):  # of the workspace
        for line in commands(page):
            if not elsewhere(line):
                run(line)


def run_python(text: str) -> None:
    """Code of a page, with the reader's names."""
    names = {f'"{k}"': f'"{v}"' for k, v in _NAMES.items()}
    for name, own in {**names, "0.15 *": "6 *", "vvc:qp={qp}": "vvc:qp={qp},preset=faster"}.items():
        text = text.replace(name, own)
    with Image.open("photo.png") as image:
        exec(text, {"image": image.convert("RGB")})


@pytest.mark.parametrize(("page", "line"), [(p, c) for p, c in COMMANDS if elsewhere(c)])
def test_what_runs_elsewhere_parses(page: Path, line: str) -> None:
    _, words = words_of(line)
    if words[0] == "tucodec":
        with redirect_stderr(StringIO()):
            cli.build_parser().parse_args(words[1:])
    for word in words:
        if re.fullmatch(r"(slurm|experiments)/[\w/]+\.(sh|yaml)", word):
            assert (ROOT / word).exists(), page


def test_commands_inside_sentences_exist() -> None:
    """`tucodec allocate --slurm N`: the command is there, and has these options."""
    found = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for line in re.findall(r"`tucodec ([^`\n]+)`", text):
            words = re.sub(r"…|\.\.\.", " ", line).split()
            names = list(itertools.takewhile(re.compile(r"[a-z0-9-]+$").match, words))[:2]
            help_text = StringIO()
            for depth in range(len(names), 0, -1):
                with redirect_stdout(help_text), redirect_stderr(StringIO()):
                    try:
                        cli.build_parser().parse_args([*names[:depth], "--help"])
                    except SystemExit as end:
                        if end.code == 0:
                            break
            assert help_text.getvalue(), f"{page.name}: tucodec {line}"
            for option in re.findall(r"(?<= )--[a-z][a-z-]*", line):
                if names[0] != "fit":
                    assert option in help_text.getvalue(), f"{page.name}: tucodec {line}"
            found += 1
    assert found > 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target
    for path in re.findall(r"\b(?:slurm|experiments)/[\w/]+\.(?:sh|yaml)\b", text):
        assert (ROOT / path).exists(), path
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|\$ )make ([a-z]+)", text):
        assert f"\n{target}:" in makefile, target
    for area in re.findall(r"AREA=([a-z_]+)", text):
        assert (ROOT / "tests" / "campaigns" / f"{area}.py").exists(), area


def test_the_site_builds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for page in DOCS:
        built = (tmp_path / page.relative_to(ROOT / "docs")).with_suffix(".html")
        loaded = re.findall(
            r"<(?:script|link|img)[^>]+(?:src|href)=\"(https?:[^\"]+)", built.read_text()
        )
        assert not loaded
