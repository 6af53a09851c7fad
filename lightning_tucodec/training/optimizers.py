"""Muon for the transforms, Adam for the rest, as one optimiser; averages of weights."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration; singular values end between 0.7 and 1.2."""


def orthogonalise(matrix: Tensor, iterations: int = 5) -> Tensor:
    """U·Vᵀ of matrix = U·S·Vᵀ, nearly: r×c to r×c, by Newton–Schulz iterations (Jordan et al., 2024).

    Three iterations leave small singular values small; bfloat16 is precise enough (ibid.).
    """
    a, b, c = _NEWTON_SCHULZ
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / (wide.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


class MuonAdam(torch.optim.Adam):
    """Momentum steps with orthogonalised directions for matrices, Adam for everything else.

    A convolution's weight counts as the matrix out × (in·taps). Its step is scaled by
    0.2·√max(rows, columns), so that one learning rate, that of Adam, serves both groups (Liu et al.,
    "Muon is Scalable for LLM Training", 2025, section 2.2). On a CPU the orthogonalisation pays while the
    batch is large against the weights: it costs a quarter to a third of a step of `tiny` with 8 crops of
    128².

    Args:
        matrices: weights that get the orthogonalised step; at least two dimensions each.
        others: all other parameters.
        lr: learning rate.
        momentum: of the matrices' steps (with Nesterov's look-ahead).
        iterations: of Newton and Schulz.
        dtype: they compute in.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        others: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        iterations: int = 5,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        groups = [{"params": list(matrices), "muon": True}, {"params": list(others), "muon": False}]
        self._momentum = momentum
        self._iterations, self._dtype = iterations, dtype
        super().__init__(groups, lr=lr, fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both groups."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        for group in groups:
            if group["muon"]:
                for parameter in group["params"]:
                    self._muon_step(parameter, group["lr"])
        try:
            self.param_groups = [group for group in groups if not group["muon"]]
            super().step()
        finally:
            self.param_groups = groups
        return loss

    def _muon_step(self, parameter: Tensor, lr: float) -> None:
        if parameter.grad is None:
            return
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
            state["step"] = torch.zeros(())  # Adam looks for it in every state that it loads
        state["step"] += 1
        momentum = state["momentum"].lerp_(parameter.grad, 1 - self._momentum)
        ahead = parameter.grad.lerp(momentum, self._momentum)
        matrix = ahead.reshape(ahead.shape[0], -1)
        scale = 0.2 * max(matrix.shape) ** 0.5
        step = orthogonalise(matrix.to(self._dtype), self._iterations).to(parameter.dtype)
        parameter.add_(step.reshape(parameter.shape), alpha=-lr * scale)


def muon_adam(
    network: nn.Module, parts: Iterable[str], lr: float, least: int = 32, **options: Any
) -> MuonAdam:
    """MuonAdam over a network.

    Args:
        network: whose parameters are trained, all but the frozen ones.
        parts: names of the children whose convolutions are matrices to Muon, as in ("g_a", "context").
        lr: learning rate.
        least: a weight with fewer rows or columns (depthwise, RGB) is left to Adam.
        options: more arguments of MuonAdam.
    """
    prefixes = tuple(f"{part}." for part in parts)
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        # Three dimensions: output, input and taps of `nn.context.TapConv2d`.
        fits = parameter.ndim >= 3 and min(len(parameter), parameter[0].numel()) >= least
        (matrices if fits and name.startswith(prefixes) else others).append(parameter)
    return MuonAdam(matrices, others, lr, **options)


@torch.no_grad()
def follow(average: nn.Module, network: nn.Module, decay: float, steps: int) -> None:
    """Move an exponential moving average of weights; while it is young it forgets faster.

    Args:
        average: has the same weights by the same names; its buffers become the network's.
        network: what is trained.
        decay: share of the old average that a step keeps, once the average is old enough.
        steps: of the network so far.
    """
    weight = 1 - min(decay, steps / (steps + 10))
    for own, other in zip(average.parameters(), network.parameters(), strict=True):
        own.lerp_(other, weight)
    for old, new in zip(average.buffers(), network.buffers(), strict=True):
        old.copy_(new)
