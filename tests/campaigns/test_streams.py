"""A fast slice of the campaign on hostile streams, and the campaign's own machinery."""

import json
import os
import time
from pathlib import Path

import pytest
import streams

from lightning_tucodec.coding.container import CodecKind, Container, pack, unpack

CORPUS = [
    pack(Container(CodecKind.LEARNED, b"model-id", 16, 16, (bytes(range(20)),))),
    pack(Container(CodecKind.LEARNED, b"model-id", 300, 200, (bytes(500), b"", b"end"))),
    pack(Container(CodecKind.VVC, bytes(8), 2000, 1500, (b"\xaa" * 3000,), flags=3)),
]


def dies_on_damage(data: bytes) -> Container:
    """A decoder with every fault that the campaign must survive and count."""
    fault = sum(data) % 4
    if data not in CORPUS and fault == 0:
        os._exit(9)
    if data not in CORPUS and fault == 1:
        time.sleep(3600)
    if data not in CORPUS and fault == 2:
        raise ZeroDivisionError("two\nlines")
    return unpack(data)


@pytest.mark.parametrize("seed", [1, 2])
def test_container_survives_a_slice(seed: int) -> None:
    for case in range(2_000):
        name, data = streams.mutated(seed, case, CORPUS)
        result = streams.outcome(unpack, name, data, CORPUS)
        assert not result.startswith("!"), (case, name, result)


def test_the_shipped_model_survives_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_tucodec.codecs.learned import latents

    monkeypatch.setattr(latents, "STRIP_POSITIONS", streams.STRIP_POSITIONS)
    _, corpus = streams.make_corpus(None)
    assert max(len(unpack(data).strips) for data in corpus) > 3
    for case in range(140):
        name, data = streams.mutated(3, case, corpus)
        result = streams.outcome(streams.decode, name, data, corpus)
        assert not result.startswith("!"), (case, name, result)


def test_cases_are_functions_of_seed_and_number() -> None:
    first = [streams.mutated(5, case, CORPUS) for case in range(70)]
    assert first == [streams.mutated(5, case, CORPUS) for case in range(70)]
    assert {name for name, _ in first} == set(streams.MUTATIONS)
    assert sum(data in CORPUS for _, data in first) < 10


def test_a_campaign_resumes_where_it_stopped(tmp_path: Path) -> None:
    target = "lightning_tucodec.coding.container:unpack"
    whole, halves = tmp_path / "whole.json", tmp_path / "halves.json"
    halves.write_text('{"resume": {"kills": 3}}')
    assert streams.campaign(target, "none", CORPUS, 1, 60, whole) == 0
    for count in (25, 60):
        assert streams.campaign(target, "none", CORPUS, 1, count, halves) == 0
    document = json.loads(halves.read_text())
    assert document["resume"] == {"kills": 3}
    for key in ("cases", "outcomes", "by_mutation", "broken"):
        assert document["streams"][key] == json.loads(whole.read_text())["streams"][key]
    assert sum(document["streams"]["outcomes"].values()) == 60


def test_crashes_hangs_and_wrong_errors_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "HANG_SECONDS", 1.0)
    results = tmp_path / "results.json"
    streams.campaign("test_streams:dies_on_damage", "none", CORPUS, 11, 7, results)
    state = json.loads(results.read_text())["streams"]
    found = {case: message for case, _, message in state["broken"]}
    expected = {}
    for case in range(7):
        _, data = streams.mutated(11, case, CORPUS)
        fault = sum(data) % 4
        if data not in CORPUS and fault < 3:
            expected[case] = [
                "the process ended with status 9",
                "hang",
                "ZeroDivisionError: two lines",
            ][fault]
    assert found == expected
    assert len(set(found.values())) == 3
    assert state["outcomes"]["broken"] == len(found)
