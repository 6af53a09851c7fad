"""What a GPU must do as a CPU does. On a machine without one the same code runs on the CPU alone.

`make gpu` runs what is marked `gpu`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_tucodec.codecs.learned.codec import TucModel
from lightning_tucodec.codecs.library import load, untrained
from lightning_tucodec.coding.container import unpack
from lightning_tucodec.nn.noise import QUANTIZER, RATE, Noise
from lightning_tucodec.training import coding
from lightning_tucodec.training.gan import GANCodec
from lightning_tucodec.training.module import ScheduledModule
from lightning_tucodec.training.runs.staging import stage
from lightning_tucodec.training.vae import VAE
from tests.support import MICRO, MUON

BATCHES, BATCH, SIDE = 4, 4, 64

pytestmark = pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step`",
    # which operations are not deterministic is seen by what they make
    "ignore:.*does not have a deterministic implementation",
    "ignore:.*Deterministic behavior was enabled",
)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "image": torch.rand(BATCH, 3, SIDE, SIDE, generator=generator),
            "index": torch.arange(first, first + BATCH),
        }
        for first in range(0, BATCHES * BATCH, BATCH)
    ]


def vae(**options: Any) -> VAE:
    torch.manual_seed(0)
    wider = MUON if options.get("optimizer") == "muon" else {}
    return VAE(lmbda=512.0, codec={**MICRO, **wider, **options.pop("codec", {})}, **options)


def trainer(device: str, steps: int, **options: Any) -> pl.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "gpu" if device == "cuda" else "cpu", "devices": 1, "max_steps": steps,
        "max_epochs": 1, "logger": False, "log_every_n_steps": 1000, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
        "limit_val_batches": 0, "plugins": [LightningEnvironment()],
    }  # fmt: skip
    return pl.Trainer(**{**settings, **options})


def fitted(module: ScheduledModule, device: str, **options: Any) -> ScheduledModule:
    data: DataLoader[Any] = DataLoader(batches(), batch_size=None)  # type: ignore[arg-type]
    trainer(device, BATCHES, **options).fit(module, data)
    return module


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}


def test_noise_is_equal_on_both_devices(device: str) -> None:
    positions = torch.tensor([0, 1, 77, 2**40 + 3])
    like = torch.empty(4, 5, 7, 3)
    for stream in (QUANTIZER, RATE):
        here = Noise.of(-5, positions).uniform(like, stream)
        there = Noise.of(-5, positions.to(device)).uniform(like.to(device), stream)
        assert torch.equal(here, there.cpu())
    assert here.unique().numel() > 300


@pytest.mark.parametrize("model", ["tiny-mse-3", "tiny", "fast", "paper"])
def test_symbols_of_the_same_latents_are_those_of_the_cpu(device: str, model: str) -> None:
    here = load(model) if "-" in model else untrained(model)
    there = TucModel(here.file, device)
    generator = torch.Generator().manual_seed(1)
    channels = here.network.config.transform.latent_channels
    y = 3 * torch.randn(2, channels, 20, 24, generator=generator)
    found = there.symbols(y.to(device))
    for one, other in zip(here.symbols(y), found, strict=True):
        assert np.array_equal(one.y, other.y)
        # z is computed by h_a, in floating point: a value may lie on the other side of a half.
        differing = np.mean([np.mean(a != b) for a, b in zip(one.z, other.z, strict=True)])
        assert differing <= (0.001 if device == "cuda" else 0)
    assert np.unique(found[0].y).size > 3
    if "-" in model:  # the same symbols make the same file, and each device reads the other's
        data = there.write(found[0], 24 * 16, 20 * 16)
        assert data == here.write(found[0], 24 * 16, 20 * 16)
        assert np.array_equal(here.read(unpack(data))[0], found[0].y)
        shown = there.decode_pixels(unpack(data)).astype(int)
        assert np.abs(shown - here.decode_pixels(unpack(data))).max() <= 1


class Stream:
    """The batches, from the place that a checkpoint names."""

    def __init__(self) -> None:
        self.position = 0

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while self.position < BATCHES:
            self.position += 1
            yield batches()[self.position - 1]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_resumed_bits(device: str, deterministic: None, optimizer: str, tmp_path: Path) -> None:
    path = tmp_path / "half.ckpt"

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
            if module.opt_step == BATCHES // 2:
                trainer.save_checkpoint(path)

    whole, resumed = vae(optimizer=optimizer), vae(optimizer=optimizer)
    trainer(device, BATCHES, callbacks=[Save()]).fit(whole, Stream())
    stream = Stream()
    trainer(device, BATCHES).fit(resumed, stream, ckpt_path=path)
    assert resumed.opt_step == stream.position == BATCHES
    found = weights(resumed)
    for name, value in weights(whole).items():
        assert torch.equal(value, found[name]), name


def test_one_process_of_a_group(device: str) -> None:
    """NCCL on a GPU, gloo on a CPU: the weights of a run without a group, but for rounding."""
    backend = "nccl" if device == "cuda" else "gloo"
    alone = weights(fitted(vae(), device))
    strategy = DDPStrategy(process_group_backend=backend, find_unused_parameters=False)
    try:
        module = vae()
        together = weights(fitted(module, device, strategy=strategy))
        assert torch.distributed.get_backend() == backend
        assert module.rows_of_all_ranks([{"index": 0.0}]) == [{"index": 0.0}]
        total = torch.ones(3, device=device)
        torch.distributed.all_reduce(total)
        assert total.tolist() == [1.0] * 3
    finally:
        torch.distributed.destroy_process_group()
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=1e-3, atol=1e-5)


def step(module: VAE, x: Tensor, noise: Noise) -> Tensor:
    return module.loss(module.network(x, noise), x).loss


def inputs(device: str) -> tuple[Tensor, Noise]:
    batch = {name: value.to(device) for name, value in batches()[0].items()}
    x = batch["image"].contiguous(memory_format=torch.channels_last)
    return x, Noise.of(0, batch["index"])


def test_one_compiled_graph(device: str) -> None:
    """Loss and gradients of the eager step but for rounding; on a CPU by graphs that are not generated."""
    torch.compiler.reset()
    module = vae().to(device)

    def eager(x: Tensor, noise: Noise) -> Tensor:
        return step(module, x, noise)

    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(eager, fullgraph=True, dynamic=False, backend=backend)
    found = []
    for run in (compiled, eager):
        module.zero_grad()
        loss = run(*inputs(device))
        loss.backward()
        norm = torch.stack(
            [p.grad.norm() for p in module.parameters() if p.grad is not None]
        ).norm()
        found.append((loss.item(), norm.item()))
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_bf16_loses_little(device: str) -> None:
    losses = {}
    for precision in ("32-true", "bf16-mixed"):
        module = fitted(vae(), device, precision=precision)
        with torch.no_grad():
            module.eval()
            losses[precision] = float(step(module.to(device), *inputs(device)))
        assert all(p.dtype == torch.float32 for p in module.parameters())
    assert losses["bf16-mixed"] == pytest.approx(losses["32-true"], rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["vae", "muon", "gan"])
def test_no_step_waits_for_the_gpu(kind: str) -> None:
    """CUDA itself says so: forward, backward, clipping and optimiser of the third step on."""
    module: Any = (
        GANCodec(recipe="mse", lmbda=256.0, codec=MICRO, discriminator_widths=[8, 8])
        if kind == "gan"
        else vae(optimizer="muon" if kind == "muon" else "adam")
    )
    seen: list[int] = []

    class Strict(pl.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            if len(seen) >= 2:
                torch.cuda.set_sync_debug_mode("error")

        def on_train_batch_end(self, *args: Any) -> None:
            torch.cuda.set_sync_debug_mode("default")
            seen.append(1)

    try:
        fitted(module, "cuda", callbacks=[Strict()])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(seen) == BATCHES


def test_threads_finish_the_same_real_files(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a validation on the device, with its files finished in the step and by threads."""
    pixels = torch.rand(6, 1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    images = [{"image": x, "index": torch.tensor([n])} for n, x in enumerate(pixels)]
    rows = []
    for threads in (0, 2):
        monkeypatch.setattr(coding, "threads_beside", lambda _, threads=threads: threads)
        module = vae()
        data: DataLoader[Any] = DataLoader(images, batch_size=None)  # type: ignore[arg-type]
        trainer(device, 1, limit_val_batches=None).validate(module, data, verbose=False)
        rows.append([row["real_bpp"] for row in module.validation_rows])
    assert rows[0] == rows[1]
    assert len(rows[0]) == len(images)
    assert min(rows[0]) > 0


def test_a_save_is_of_its_own_step_and_waits_for_nothing(device: str) -> None:
    module = vae().to(device)
    before = weights(module)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        staged, complete = stage({"state_dict": module.state_dict(), "steps": [3]})
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(1)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    complete()
    assert staged["steps"] == [3]
    assert staged["state_dict"].keys() == before.keys()
    for name, value in staged["state_dict"].items():
        assert value.device.type == "cpu"
        assert torch.equal(value, before[name])
