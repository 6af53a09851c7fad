"""Muon for the transforms, Adam for the rest, as one optimiser; averages of weights."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration; singular values end between 0.7 and 1.2."""


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """U·Vᵀ of each matrix = U·S·Vᵀ, nearly, by Newton–Schulz iterations (Jordan et al., 2024); …×r×c.

    Three iterations leave small singular values small; bfloat16 is precise enough (ibid.).
    """
    a, b, c = _NEWTON_SCHULZ
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    x = wide / (torch.linalg.matrix_norm(wide, keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if matrices.shape[-2] <= matrices.shape[-1] else x.mT


class FusedAdam(torch.optim.Adam):
    """Adam in one kernel; the device itself can skip a step, without a wait of the host.

    Attributes:
        found_inf: a float32 scalar on the device: 1 where nothing is to change. PyTorch's gradient scaler
            uses the same name; unset, every step is done.
    """

    found_inf: Tensor

    def __init__(self, params: Any, lr: float, **options: Any) -> None:
        super().__init__(params, lr=lr, fused=True, **options)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, also of an optimiser that was not fused."""
        fused = {"fused": True, "foreach": None}
        groups = [{**group, **fused} for group in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "param_groups": groups})


class MuonAdam(FusedAdam):
    """Momentum steps with orthogonalised directions for matrices, Adam for everything else.

    A convolution's weight counts as the matrix out × (in·taps). Its step is scaled by
    0.2·√max(rows, columns), so that one learning rate, that of Adam, serves both groups (Liu et al.,
    "Muon is Scalable for LLM Training", 2025, section 2.2). On a CPU the orthogonalisation pays while the
    batch is large against the weights: it costs a quarter to a third of a step of `tiny` with 8 crops of
    128². On a GPU matrices of
    equal shape are stacked, so that it is asked once for all of them.

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
        super().__init__(groups, lr=lr)

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
                for parameters in _alike(group["params"]):
                    self._muon_step(parameters, group["lr"])
        try:
            self.param_groups = [group for group in groups if not group["muon"]]
            super().step()
        finally:
            self.param_groups = groups
        return loss

    def _muon_step(self, parameters: list[Tensor], lr: float) -> None:
        """A step of matrices of one shape."""
        shapes = [parameter.shape for parameter in parameters]
        shape = shapes[0][0], shapes[0][1:].numel()
        states = [self.state[parameter] for parameter in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
                # Adam looks for it in every state that it loads.
                state["step"] = torch.zeros((), device=parameter.device)
        momenta = [state["momentum"] for state in states]

        def together(tensors: list[Tensor]) -> Tensor:
            matrices = [tensor.reshape(shape) for tensor in tensors]
            return matrices[0] if len(matrices) == 1 else torch.stack(matrices)

        def apart(stacked: Tensor) -> list[Tensor]:
            matrices = [stacked] if len(parameters) == 1 else stacked.unbind()
            return [matrix.reshape(own) for matrix, own in zip(matrices, shapes, strict=True)]

        gradients = together([p.grad for p in parameters if p.grad is not None])
        found_inf = getattr(self, "found_inf", None)
        steps = [state["step"] for state in states]
        if found_inf is None:
            torch._foreach_add_(steps, 1.0)
        else:  # a momentum moves towards itself; of one tensor for all a CPU would read the value
            torch._foreach_add_(steps, [1 - found_inf] * len(steps))
            gradients = torch.where(found_inf > 0, together(momenta), gradients)
        torch._foreach_lerp_(momenta, apart(gradients), 1 - self._momentum)
        ahead = gradients.lerp(together(momenta), self._momentum)
        step = orthogonalise(ahead.to(self._dtype), self._iterations)
        if found_inf is not None:
            step = step * (1 - found_inf).to(step.dtype)
        scale = 0.2 * max(shape) ** 0.5
        torch._foreach_add_(parameters, apart(step.to(ahead.dtype)), alpha=-lr * scale)


def _alike(parameters: list[Tensor]) -> list[list[Tensor]]:
    """Those with gradients, by their shapes as matrices; on a CPU, whose cache holds one, each alone."""
    groups: dict[tuple[int, ...], list[Tensor]] = {}
    for number, parameter in enumerate(parameters):
        if parameter.grad is not None:
            apart = number if parameter.device.type == "cpu" else 0
            groups.setdefault((apart, len(parameter), parameter[0].numel()), []).append(parameter)
    return list(groups.values())


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
def follow(
    average: nn.Module, network: nn.Module, decay: float, steps: int, found_inf: Tensor | None
) -> None:
    """Update an exponential moving average of weights; its decay is faster at the start of a run.

    Args:
        average: has the same weights by the same names; its buffers become the network's.
        network: what is trained.
        decay: share of the old average that a step keeps, once the average is old enough.
        steps: of the network so far.
        found_inf: as of `FusedAdam`: where it is 1, the average's weights stay as they are.
    """
    weight = 1 - min(decay, steps / (steps + 10))
    averages: list[Tensor] = list(average.parameters())
    ways = torch._foreach_sub(list(network.parameters()), averages)
    if found_inf is not None:  # not by a lerp, whose weight the host would have to know
        torch._foreach_mul_(ways, 1 - found_inf)
    torch._foreach_add_(averages, ways, alpha=weight)
    if buffers := list(average.buffers()):
        torch._foreach_copy_(buffers, list(network.buffers()))
