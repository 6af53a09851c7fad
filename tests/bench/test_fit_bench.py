"""`tucodec bench fit` at its smallest: what it times is there, and counted."""

from pathlib import Path

import pytest

from lightning_tucodec.bench import fit, timing, train_peer
from lightning_tucodec.cli import main
from tests.support import MICRO


def test_rows_and_bounds(photo_folder: Path) -> None:
    result = fit.run(str(photo_folder), steps=fit.WARM_STEPS + 4, repeats=1, codec=MICRO)
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == [fit.BARE, fit.FIT, fit.SAVING]
    ratio = rows[fit.FIT]["median_s"] / rows[fit.BARE]["median_s"]
    assert rows[fit.FIT]["ratio_to"][fit.BARE] == pytest.approx(ratio, rel=0.01)
    assert result["asked"][0]["value"] == pytest.approx(ratio - 1, abs=0.01)
    assert result["asked"][0]["met"] == (result["asked"][0]["value"] <= 0.03)
    assert result["steps that began a save"] in {"1 of 3", "2 of 3", "3 of 3"}
    assert "fit, saving all the time" in timing.table_text(result)


def test_too_few_steps(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "fit", "--steps", "11"]) == 1
    assert "the first 11 do not count" in capsys.readouterr().err


def test_a_peer_of_as_many_parameters() -> None:
    result = train_peer.run(batch=1, crop=64, repeats=1)
    ours, theirs = result["parameters"].values()
    assert theirs["parameters"] == pytest.approx(ours, rel=0.1)
    assert [row["name"] for row in result["rows"]] == [
        "tiny, adam", "tiny, muon", train_peer.PEER,
    ]  # fmt: skip
    assert result["asked"][0]["value"] > 0
