"""A fast slice of the campaign on hostile files, and its guard."""

import shutil
from pathlib import Path

import hostile
import pytest

from lightning_tucodec.errors import ConfigError, TucodecError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return hostile.build_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def guard() -> hostile.Guard:
    return hostile.Guard()


@pytest.mark.parametrize("part", range(4))
def test_every_kind_survives_a_slice(
    part: int, corpus: dict[str, Path], guard: hostile.Guard, tmp_path: Path
) -> None:
    size = len(hostile.TURNS)
    for case in range(part * size, (part + 1) * size):
        result, seconds, _, memory = hostile.attempt(1, case, corpus, tmp_path, guard)
        assert not result.startswith("!"), (case, hostile.mutated(1, case, corpus)[:2], result)
        assert seconds < hostile.LIMIT_SECONDS, case
        assert memory < 1, case
    assert not list(tmp_path.iterdir())


def test_the_honest_folders_are_used_without_an_error(
    corpus: dict[str, Path], guard: hostile.Guard, tmp_path: Path
) -> None:
    for name, kind in hostile.KINDS.items():
        shutil.copytree(corpus[name], tmp_path / name / "in")
        (tmp_path / name / "out").mkdir()
        folders = tmp_path / name / "in", tmp_path / name / "out"
        assert hostile.outcome(kind, *folders, False, guard) == "success", name


class Lines(TucodecError):
    """An error that breaks the rule of one line."""

    def __str__(self) -> str:
        return "two\nlines"


def test_what_breaks_a_rule_is_found(guard: hostile.Guard, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    outside = tmp_path.parent / f"{tmp_path.name}-outside"

    def judged(action: object) -> str:
        def use(folder: Path, out: Path, seldom: bool) -> None:
            action()  # type: ignore[operator]

        kind = hostile.Kind(lambda folder: None, {}, use)
        return hostile.outcome(kind, tmp_path / "in", tmp_path / "out", False, guard)

    def fail(error: BaseException) -> None:
        raise error

    assert judged(lambda: None) == "success"
    assert judged(lambda: fail(ConfigError("a line"))) == "ConfigError"
    assert judged(lambda: fail(TucodecError("\x1b[2J of\ntwo lines"))) == "TucodecError"
    assert judged(lambda: fail(Lines())).startswith("!a message of several")
    assert judged(lambda: fail(KeyError("x"))).startswith("!KeyError at test_hostile.py")
    assert judged(lambda: (tmp_path / "inside").write_text("x")) == "success"
    assert judged(lambda: outside.write_text("x")).startswith("!open")
    assert judged(lambda: outside.unlink()).startswith("!os.remove")
    assert judged(lambda: (tmp_path / "inside").rename(outside)).startswith("!os.rename")
    outside.unlink()


def test_cases_are_functions_of_seed_and_number(corpus: dict[str, Path]) -> None:
    cases = range(3 * len(hostile.TURNS))
    first = [hostile.mutated(5, case, corpus) for case in cases]
    assert first == [hostile.mutated(5, case, corpus) for case in cases]
    assert {name for name, _, _ in first} == set(hostile.KINDS)
    changed = [(corpus[name] / file).read_bytes() != data for name, file, data in first]
    assert sum(changed) > 0.9 * len(changed)
