"""A training step of ours beside one of CompressAI's joint model with as many parameters.

Both in one process, on the same crops, with the same threads, in turns. Each is trained as its own project
does it: ours as `training.vae.VAE` (channels last) with either of its optimisers, theirs as CompressAI's
`examples/train.py` (Adam for the network, another for the medians of z, rate-distortion loss, gradients
clipped to 1).
"""

import statistics
from collections.abc import Callable
from typing import Any, Literal

import torch

from lightning_tucodec.bench.timing import asked, in_turns, machine, rows_of
from lightning_tucodec.codecs.network.build import imported
from lightning_tucodec.training.vae import VAE

PEER = "CompressAI, joint model"

WARM_STEPS = 3


def _count(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _ours(module: VAE, x: torch.Tensor) -> Callable[[], None]:
    optimizer = module.configure_optimizers()
    x = x.contiguous(memory_format=torch.channels_last)
    module.train()

    def step() -> None:
        optimizer.zero_grad()
        module.loss(module.network(x), x).loss.backward()
        module.clip(optimizer)
        optimizer.step()

    return step


def _theirs(parameters: int, x: torch.Tensor) -> tuple[Callable[[], None], dict[str, int]]:
    """The joint model (mbt2018) with M = 3/2·N, N the multiple of 4 that comes closest in parameters."""
    joint = imported("compressai.models").JointAutoregressiveHierarchicalPriors

    def distance(n: int) -> int:
        return abs(_count(joint(n, 3 * n // 2)) - parameters)

    width = min(range(16, 97, 4), key=distance)
    network = joint(width, 3 * width // 2).train()
    auxiliary = {name for name, _ in network.named_parameters() if name.endswith(".quantiles")}
    main = [p for name, p in network.named_parameters() if name not in auxiliary]
    optimizer = torch.optim.Adam(main, lr=1e-4)
    aux_optimizer = torch.optim.Adam(
        [p for name, p in network.named_parameters() if name in auxiliary], lr=1e-3
    )
    criterion = imported("compressai.losses").RateDistortionLoss(lmbda=0.01)

    def step() -> None:
        optimizer.zero_grad()
        aux_optimizer.zero_grad()
        criterion(network(x), x)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        network.aux_loss().backward()
        aux_optimizer.step()

    return step, {"N": width, "M": 3 * width // 2, "parameters": _count(network)}


def run(batch: int = 8, crop: int = 128, repeats: int = 10) -> dict[str, Any]:
    """Seconds of a step of `tiny` and of CompressAI's model.

    Args:
        batch: crops a step.
        crop: side of the square crops. They are noise, since their content does not change the time.
        repeats: steps that count, after three that do not.
    """
    torch.manual_seed(0)
    x = torch.rand(batch, 3, crop, crop)
    kinds: tuple[Literal["adam", "muon"], ...] = ("adam", "muon")
    modules = {f"tiny, {kind}": VAE(codec={"quantizer": "noise"}, optimizer=kind) for kind in kinds}
    parameters = _count(next(iter(modules.values())).network)
    theirs, size = _theirs(parameters, x)
    actions = {name: _ours(module, x) for name, module in modules.items()} | {PEER: theirs}
    for _ in range(WARM_STEPS):
        for action in actions.values():
            action()
    times = in_turns(actions, repeats)
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    return {
        "rows": rows_of(times, {name: {PEER: median[name] / median[PEER]} for name in modules}),
        "asked": [
            asked(f"{name}: times faster than {PEER}", median[PEER] / median[name], at_least=1.3)
            for name in modules
        ],
        "batch": f"{batch} crops of {crop}x{crop}",
        "parameters": {"tiny": parameters, PEER: size},
        "threads": torch.get_num_threads(),
        "machine": machine(),
    }
