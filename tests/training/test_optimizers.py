"""MuonAdam: orthogonal directions for matrices, plain Adam for the rest, exact resume."""

import copy
import io

import pytest
import torch
from torch import nn

from lightning_tucodec.nn.codec import PRESETS, TucodecVAE
from lightning_tucodec.training.optimizers import FusedAdam, MuonAdam, muon_adam, orthogonalise


@pytest.mark.parametrize("shape", [(32, 32), (16, 90), (90, 16)])
def test_singular_values_become_nearly_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape) @ torch.diag(torch.logspace(0, -1, shape[1]))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonalise(matrix)
    values = torch.linalg.svdvals(result)
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.3
    # The directions are kept: the result is close to U·Vᵀ, not to some other orthogonal matrix.
    assert float((result * (u @ v)).sum()) > 0.8 * min(shape)


def test_a_step_has_the_stated_size() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(16, 64))
    optimizer = MuonAdam([weight], [nn.Parameter(torch.zeros(1))], lr=0.01)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    # An orthogonal 16×64 matrix has the root mean square 1/8; 0.2·√64/8 = 0.2.
    rms = float(weight.detach().square().mean().sqrt())
    assert rms == pytest.approx(0.01 * 0.2, rel=0.2)


def test_three_iterations_in_bfloat16_go_the_same_way() -> None:
    torch.manual_seed(0)
    gradient = torch.randn(48, 90) @ torch.diag(torch.logspace(0, -1, 90))
    steps = []
    for options in ({}, {"iterations": 3, "dtype": torch.bfloat16}):
        weight = nn.Parameter(torch.zeros(48, 90))
        optimizer = MuonAdam([weight], [nn.Parameter(torch.zeros(1))], lr=0.01, **options)  # type: ignore[arg-type]
        weight.grad = gradient.clone()
        optimizer.step()
        assert weight.dtype == optimizer.state[weight]["momentum"].dtype == torch.float32
        steps.append(weight.detach().flatten())
    assert not torch.equal(*steps)
    assert float(torch.cosine_similarity(*steps, dim=0)) > 0.97
    assert float(steps[1].norm() / steps[0].norm()) == pytest.approx(1, abs=0.15)


def test_others_are_plain_adam() -> None:
    torch.manual_seed(0)
    start = torch.randn(5)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    matrix = nn.Parameter(torch.randn(4, 4))
    mixed = MuonAdam([matrix], [ours], lr=0.01)
    plain = torch.optim.Adam([theirs], lr=0.01, fused=True)
    for _ in range(3):
        gradient = torch.randn(5)
        ours.grad, theirs.grad, matrix.grad = gradient, gradient.clone(), torch.randn(4, 4)
        mixed.step()
        plain.step()
    assert torch.equal(ours, theirs)
    assert len(mixed.param_groups) == 2


def test_which_weights_are_matrices() -> None:
    network = TucodecVAE(PRESETS["tiny"])
    parts = ("g_a", "g_s", "context")
    matrices, others = muon_adam(network, parts, 1e-3).param_groups
    names = {id(p): n for n, p in network.named_parameters()}
    chosen = {names[id(p)] for p in matrices["params"]}
    left = {names[id(p)] for p in others["params"]}
    assert chosen | left == set(names.values())
    assert not chosen & left
    assert {name.partition(".")[0] for name in chosen} == set(parts)
    assert any("expand" in name for name in chosen)
    assert "context.vertical.0.conv1.weight" in chosen
    assert not any("depthwise" in name or name.endswith("bias") for name in chosen)


def test_resumed_steps_are_the_same() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(32, 32, 1), nn.ReLU(), nn.Conv2d(32, 3, 3))
    x = torch.randn(2, 32, 8, 8)

    def run(net: nn.Module, optimizer: MuonAdam, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()

    optimizer = muon_adam(network, ("0", "2"), 1e-2)
    run(network, optimizer, 2)
    file = io.BytesIO()
    torch.save({"net": network.state_dict(), "opt": optimizer.state_dict()}, file)
    run(network, optimizer, 2)

    other = copy.deepcopy(network)
    file.seek(0)
    content = torch.load(file, weights_only=True)
    other.load_state_dict(content["net"])
    again = muon_adam(other, ("0", "2"), 1e-2)
    again.load_state_dict(content["opt"])
    run(other, again, 2)
    for one, two in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("shape", [(4, 16, 90), (3, 90, 16)])
def test_stacked_matrices_are_those_alone(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    alone = torch.stack([orthogonalise(matrix) for matrix in matrices])
    torch.testing.assert_close(orthogonalise(matrices), alone, atol=1e-5, rtol=0)

    weights = [nn.Parameter(matrix.unflatten(1, (-1, 2)).clone()) for matrix in matrices]
    others = [nn.Parameter(weight.detach().clone()) for weight in weights]
    for weight, other in zip(weights, others, strict=True):
        weight.grad = torch.randn_like(weight)
        other.grad = weight.grad.clone()
    for parameters in ([weights], [[other] for other in others]):
        optimizer = MuonAdam([p for group in parameters for p in group], [], lr=0.1)
        for group in parameters:  # a GPU's way, a CPU's
            with torch.no_grad():
                optimizer._muon_step(group, 0.1)
    torch.testing.assert_close(weights, others, atol=1e-5, rtol=0)


def _state(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [value.clone() for state in optimizer.state.values() for value in state.values()]


@pytest.mark.parametrize("muon", [False, True])
def test_a_step_that_is_called_off_changes_nothing(muon: bool) -> None:
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(3))]
    optimizer: FusedAdam = (
        MuonAdam(weights[:1], weights[1:], lr=0.1) if muon else FusedAdam(weights, lr=0.1)
    )

    def step(found: float, gradient: float) -> None:
        optimizer.found_inf = torch.tensor(found)
        for weight in weights:
            weight.grad = torch.full_like(weight, gradient)
        optimizer.step()

    step(0.0, 0.5)
    before, state = [w.detach().clone() for w in weights], _state(optimizer)
    step(1.0, torch.nan)
    step(1.0, 0.5)
    assert all(map(torch.equal, before, weights))
    assert all(map(torch.equal, _state(optimizer), state))
    step(0.0, 0.5)
    assert not any(map(torch.equal, before, weights))
    assert all(torch.isfinite(weight).all() for weight in weights)


def test_a_state_from_before_goes_on_fused() -> None:
    weight = nn.Parameter(torch.ones(3))
    old = torch.optim.Adam([weight], lr=0.1, betas=(0.5, 0.99))
    weight.grad = torch.ones(3)
    old.step()
    new = FusedAdam([weight], lr=0.1, betas=(0.5, 0.99))
    new.load_state_dict(old.state_dict())
    assert new.param_groups[0]["fused"]
    new.found_inf = torch.tensor(1.0)
    new.step()
    assert float(new.state[weight]["step"]) == 1
