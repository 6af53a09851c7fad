"""A fast slice of the kill campaign on builds and loaders."""

import json
from pathlib import Path

import data as kills
import pytest


@pytest.mark.parametrize("case", [0, 1])
@pytest.mark.parametrize("area", sorted(kills.AREAS))
def test_killed_and_yet_the_same(area: str, case: int, tmp_path: Path) -> None:
    _, wrong = kills.AREAS[area](2, case, tmp_path)
    assert wrong == ""


def test_campaign_counts_and_goes_on(tmp_path: Path) -> None:
    results = tmp_path / "campaigns.json"
    results.write_text(json.dumps({"other": 1}))
    assert kills.campaign(3, 1, results) == 0
    before = json.loads(results.read_text())
    assert before["other"] == 1
    assert before["data"]["build"]["kills"] >= 1
    assert kills.campaign(3, 1, results) == 0
    assert json.loads(results.read_text()) == before
