"""A slice of the campaign on hostile streams over files of networks of CompressAI's form."""

from pathlib import Path

import pytest
import streams

import lightning_tucodec as tuc
from lightning_tucodec.codecs.network.codec import NetworkModel
from tests.codecs import zoo
from tests.support import photo

NETWORKS = (
    *(
        "FactorizedPrior",
        "MeanScaleHyperprior",
        "Cheng2020AnchorCheckerboard",
        "Elic2022Chandelier",
    ),
    *("JointAutoregressiveHierarchicalPriors", "ScaleHyperpriorVbr"),
    "JointAutoregressiveHierarchicalPriorsVbr",
)
"""One of every way of coding: exact, by their strings, by their streams in parts."""


def test_networks_survive_a_slice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUCODEC_MODELS", str(tmp_path))
    corpus = []
    for name in NETWORKS:
        file = zoo.model(name, name)
        file.save(tmp_path / f"{name}.safetensors")
        model = NetworkModel(file)
        corpus += [model.encode(photo("coffee.png", *size)) for size in ((101, 75), (64, 130))]
    outcomes = set()
    for case in range(280):
        name, data = streams.mutated(5, case, corpus)
        result, seconds, _ = streams.measured(
            lambda name=name, data=data: streams.outcome(tuc.decompress, name, data, corpus)
        )
        assert not result.startswith("!"), (case, name, result)
        assert seconds < 5, (case, name, result)
        outcomes.add(result)
    assert {"image", "CorruptStreamError", "UnknownModelError"} <= outcomes
