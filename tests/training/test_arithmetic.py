"""One option decides how a GPU computes; a CPU is left alone."""

from typing import Any

import pytest
import torch

from lightning_tucodec.training.arithmetic import Arithmetic, _memory, arithmetic


def flags() -> tuple[Any, ...]:
    return (
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
        _memory.fill_uninitialized_memory,
    )


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("reproducible", ("highest", False, False, True, False)),
        ("fast", ("high", True, True, False, False)),
    ],
)
def test_all_flags_of_a_gpu(
    kind: Arithmetic, expected: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = flags()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with arithmetic(kind):
        assert flags() == before
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with arithmetic(kind):
        assert flags() == expected
    assert flags() == before
