"""README and docs say only what is there: every command parses, every link and file exists."""

import itertools
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from lightning_tucodec.cli import build_parser
from lightning_tucodec.codecs.registry import CLASSES, codec
from lightning_tucodec.report.sources import published

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", *DOCS, *sorted((ROOT / "experiments").rglob("*.md"))]
LIGHTNING = ("fit", "validate", "test")


def code_lines(page: Path) -> Iterator[str]:
    """Lines of fenced and indented code, continued ones joined."""
    fenced, line = False, ""
    for raw in page.read_text(encoding="utf-8").splitlines():
        if raw.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or raw.startswith("    ") or line:
            line += raw.strip()
            if line.endswith("\\"):
                line = line[:-1]
            else:
                yield line.removeprefix("$ ")
                line = ""


def expand(word: str) -> list[str]:
    """A shell's braces: `a={1,2},b` is two words."""
    parts = re.split(r"\{([^{}]*)\}", word)
    choices = [part.split(",") if index % 2 else [part] for index, part in enumerate(parts)]
    return ["".join(choice) for choice in itertools.product(*choices)]


def commands() -> list[tuple[str, list[str]]]:
    """Page and words of every line that begins with `tucodec`."""
    found = []
    for page in PAGES:
        for line in code_lines(page):
            if line.startswith("tucodec ") and "COMMAND" not in line:
                words = [w for word in shlex.split(line, comments=True) for w in expand(word)]
                found.append((page.name, words[1:]))
    return found


COMMANDS = commands()


def test_commands_are_found() -> None:
    assert len(COMMANDS) > 15
    assert expand("vvc:qp={1,2},x={a,b}")[1] == "vvc:qp=1,x=b"


@pytest.mark.parametrize(
    ("page", "words"), [(page, words) for page, words in COMMANDS if words[0] not in LIGHTNING]
)
def test_commands_parse(page: str, words: list[str]) -> None:
    error = StringIO()
    with redirect_stderr(error):
        try:
            arguments = build_parser().parse_args(words)
        except SystemExit:
            pytest.fail(f"{page}: tucodec {shlex.join(words)}: {error.getvalue()}")
    for specification in (
        *(getattr(arguments, "codec", None) or ()),
        *(getattr(arguments, "candidate", None) or ()),
    ):
        if specification.partition(":")[0] in CLASSES:
            assert codec(specification).name
    for source in getattr(arguments, "sources", ()):
        if source.startswith("published:"):
            assert source.removeprefix("published:") in published()


@pytest.mark.parametrize(
    ("page", "words"), [(page, words) for page, words in COMMANDS if words[0] in LIGHTNING]
)
def test_configs_of_trainings_are_understood(
    page: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_tucodec.training.fit import main

    monkeypatch.chdir(ROOT)
    output = StringIO()
    status: object = None
    with redirect_stdout(output), redirect_stderr(output):
        try:
            status = main([*words, "--print_config"])
        except SystemExit as end:  # how that option ends
            status = end.code
    said = f"{page}: tucodec {shlex.join(words)}: {output.getvalue()}"
    assert status in (0, None), said
    assert "model:" in output.getvalue(), said


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
