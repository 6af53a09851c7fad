"""A fast slice of the campaign on hostile submissions, and that it finds what is wrong."""

import collections
from pathlib import Path

import hostile_submissions as hostile
import pytest

from lightning_tucodec.sets import clic, manifest


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hostile.make_corpus(tmp_path_factory.mktemp("honest"))


def test_submissions_survive_a_slice(honest: Path) -> None:
    found: collections.Counter[str] = collections.Counter()
    for case in range(200):
        name, (result, seconds, _, memory) = hostile.run_case(2, case, honest)
        assert not result.startswith("!"), (case, name, result)
        assert seconds < hostile.LIMIT_SECONDS, case
        assert memory < 1, case
        found[result] += 1
    assert found.keys() >= {"sound", "wrong", "ConfigError"}


def test_a_believing_verifier_is_found(honest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files unchecked and the keys as well: both kinds of faults are counted."""
    monkeypatch.setattr(clic, "wrong_files", lambda folder, manifest: [])
    monkeypatch.setattr(manifest, "_check_manifest", lambda content: None)
    results = [hostile.run_case(2, case, honest)[1][0] for case in range(40)]
    assert "!accepted" in results
    assert {result.partition(":")[0] for result in results} & {"!KeyError", "!TypeError"}
