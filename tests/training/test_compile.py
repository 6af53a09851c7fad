"""Network and loss are one graph, in training and evaluation, for all presets and quantisers."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.exc import InductorError

from lightning_tucodec.errors import ConfigError
from lightning_tucodec.nn.noise import Noise
from lightning_tucodec.nn.postfilter import SIZES
from lightning_tucodec.training.beside.companions import SIGNALS
from lightning_tucodec.training.network import NetworkModule
from lightning_tucodec.training.postfilter import PostFilterModule, _picture
from lightning_tucodec.training.vae import VAE
from tests.codecs import zoo
from tests.support import MICRO
from tests.training.test_traffic import precoded

THIN: dict[str, Any] = {
    "tiny": MICRO,
    "fast": {**MICRO, "transform.widths": [6, 8, 10, 12], "context.levels": 1},
    "paper": {**MICRO, "transform.widths": [8, 8, 8, 8], "context.levels": 2},
}
"""The presets' graphs with few channels."""


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-5)


def gradients(module: torch.nn.Module) -> list[Tensor | None]:
    found = [None if p.grad is None else p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    return found


@pytest.mark.parametrize(
    ("preset", "kind", "backend"),
    [
        ("tiny", "centres", "aot_eager"), ("fast", "centres", "eager"), ("paper", "centres", "eager"),
        ("tiny", "companded", "eager"), ("tiny", "round", "eager"), ("tiny", "noise", "eager"),
        ("tiny", "hard", "eager"), ("tiny", "levels", "eager"),
    ],
)  # fmt: skip
def test_codec_and_loss(preset: str, kind: str, backend: str) -> None:
    """No break in the graph; `aot_eager` traces the backward pass too."""
    torch.manual_seed(0)
    several: dict[str, Any] = {"quantizer": "noise", "levels": 3}
    proxy = {"hard": {"rate_proxy": "hard"}, "levels": several}.get(kind, {"quantizer": kind})
    module = VAE(
        preset=preset, codec={**THIN[preset], **proxy}, recipe="mse",
        frozen=["g_a"] if kind == "hard" else None,
    )  # fmt: skip
    x = torch.rand(2, 3, 48, 80).contiguous(
        memory_format=torch.channels_last
    )  # sides that are padded
    noise = Noise.of(0, torch.tensor([3, 2**33]))
    graph = torch.compile(module._terms, fullgraph=True, backend=backend)
    # Evaluation differs between quantisers only in rounding; one that is written out is enough.
    for training in (True,) if kind in ("companded", "noise", "hard", "levels") else (True, False):
        module.train(training)
        with torch.set_grad_enabled(training):
            eager, whole = module._terms(x, noise), graph(x, noise)
        close(tuple(whole), tuple(eager))
        if training:
            eager.loss.backward()
            expected = gradients(module)
            whole.loss.backward()
            close(gradients(module), expected)


@pytest.mark.parametrize(
    ("family", "backend"),
    [
        ("MeanScaleHyperprior", "aot_eager"), ("JointAutoregressiveHierarchicalPriors", "eager"),
        ("Cheng2020AnchorCheckerboard", "eager"), ("Elic2022Official", "eager"),
    ],
)  # fmt: skip
def test_network_of_compressai_and_loss(
    family: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Auxiliary loss included; these backends draw the noise that the eager step draws."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch.manual_seed(0)
    module = NetworkModule(zoo.described(family), lmbda=0.01, compile=True)
    x, found = torch.rand(2, 3, 48, 80), []
    for step in (module._terms, module.terms):
        torch.manual_seed(1)
        terms, auxiliary = step(x, None)
        (terms.loss + auxiliary).backward()
        found.append([*terms, auxiliary, *gradients(module)])
    close(found[1], found[0])


def test_ms_ssim_is_part_of_the_graph() -> None:
    torch.manual_seed(0)
    module = VAE(codec=MICRO, recipe="ssim", lmbda=0.4)
    x, noise = torch.rand(1, 3, 208, 208), Noise.of(0, torch.tensor([1]))
    graph = torch.compile(module._terms, fullgraph=True, backend="eager")
    close(tuple(graph(x, noise)), tuple(module._terms(x, noise)))


@pytest.mark.parametrize("size", SIZES)
def test_post_filter_and_loss(size: str) -> None:
    torch.manual_seed(0)
    module = PostFilterModule(size, network={"channels": 8, "blocks": 2})
    batch = next(precoded())
    arguments = _picture(batch), batch["image"], batch["image"]
    graph = torch.compile(module._ratios, fullgraph=True, backend="eager")
    for training in (True, False):
        with torch.set_grad_enabled(training):
            close(graph(*arguments), module._ratios(*arguments))


def test_the_option_compiles_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    original = torch.compile

    def compile(function: Any, **options: Any) -> Any:
        calls.append(options)
        return original(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", compile)
    for compiled in (False, True):
        torch.manual_seed(0)
        module = PostFilterModule(network={"channels": 8, "blocks": 1}, compile=compiled)
        module._trainer = SimpleNamespace(log_every_n_steps=0, world_size=1)  # type: ignore[assignment]
        module.training_step(next(precoded()), 0).backward()
        assert module.images_seen == 2
        assert any(gradient is not None for gradient in gradients(module))
        assert all("_orig_mod" not in name for name in module.state_dict())
        assert calls == [{"fullgraph": True, "dynamic": False}] * compiled


FAILS = (
    r"^model\.compile: the compiler of this training step fails: g\+\+ ends with 1; leave it out$"
)


def test_a_compiler_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(*_: Any) -> Any:
        raise OSError("g++ ends with 1\nand says much")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    module = PostFilterModule(network={"channels": 8, "blocks": 1}, compile=True)
    module._trainer = SimpleNamespace(log_every_n_steps=0, world_size=1)  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=FAILS):
        module.training_step(next(precoded()), 0)


def test_a_compiler_that_fails_in_the_backward_pass_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Inductor compiles the backward graph when it first runs."""

    def fails(*_: Any) -> Any:
        raise InductorError(OSError("g++ ends with 1"), None)

    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph), bw_compiler=fails)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    module = PostFilterModule(network={"channels": 8, "blocks": 1}, compile=True)
    module._trainer = SimpleNamespace(log_every_n_steps=0, world_size=1)  # type: ignore[assignment]
    loss = module.training_step(next(precoded()), 0)
    with pytest.raises(ConfigError, match=FAILS):
        module.backward(loss)


def test_a_stop_does_not_end_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm, `timeout` and terminals signal the compiler's processes as well."""
    sent: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, _: sent.append(number))

    def compiler(graph: Any, _: Any) -> Any:
        child = (
            "import os, signal; [os.kill(os.getpid(), s) for s in (signal.SIGUSR1, signal.SIGTERM)]"
        )
        subprocess.run([sys.executable, "-c", child], check=True)
        os.kill(os.getpid(), signal.SIGTERM)
        return make_boxed_func(graph)

    try:
        backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
        module = PostFilterModule(network={"channels": 8, "blocks": 1}, compile=True)
        module._trainer = SimpleNamespace(log_every_n_steps=0, world_size=1)  # type: ignore[assignment]
        module.backward(module.training_step(next(precoded()), 0))
        assert sent
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(SIGNALS)
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"model\.compile: .* there is no no-such-compiler here"):
        PostFilterModule(network={"channels": 8, "blocks": 1}, compile=True)
