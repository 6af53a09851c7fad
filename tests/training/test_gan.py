"""GANCodec with networks of a few thousand weights: the game, its cut, its counters, its resume."""

import contextlib
import os
import random
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.environments import LightningEnvironment
from torch import Tensor

from lightning_tucodec.cli import main
from lightning_tucodec.errors import ConfigError
from lightning_tucodec.nn.discriminator import Verdict
from lightning_tucodec.nn.noise import Noise
from lightning_tucodec.training.adversarial import GameError
from lightning_tucodec.training.data import PatchDataModule
from lightning_tucodec.training.game import Turn
from lightning_tucodec.training.gan import GANCodec
from lightning_tucodec.training.module import NonFiniteLossError
from lightning_tucodec.training.runs.tracking import JsonlLogger, read_metrics
from lightning_tucodec.training.runs.weights import network_weights
from tests.support import MICRO
from tests.training.test_fit import config, runs, same, state, without_time, write

CROP, BATCH = 32, 4

# Lightning compares with the batches of one pass; ours are short.
pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")


SETTINGS: dict[str, Any] = {
    "recipe": "mse", "lmbda": 256.0, "preset": "tiny", "codec": MICRO, "lr": 1e-3,
    "warmup_steps": 2, "discriminator_widths": [8, 8], "discriminator_lr": 1e-3,
}  # fmt: skip


def module(**options: Any) -> GANCodec:
    """Freshly initialised, always with the same weights."""
    torch.manual_seed(0)
    return GANCodec(**{**SETTINGS, **options})


def trainer(folder: Path, steps: int, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_epochs": -1, "logger": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
        "default_root_dir": str(folder), "plugins": [LightningEnvironment()],
    }  # fmt: skip
    return pl.Trainer(max_steps=steps, callbacks=list(callbacks), **{**settings, **options})


def data(shards: Path, val: Path | None = None) -> PatchDataModule:
    return PatchDataModule(str(shards), BATCH, CROP, val_images=None if val is None else str(val))


@contextlib.contextmanager
def playing(game: GANCodec) -> Iterator[GANCodec]:
    """`play` without a trainer."""
    game.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign,assignment]
    game.train()
    yield game


def gradients(part: torch.nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in part.parameters()]


def played(turn: Turn, **options: Any) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients of codec and discriminator after one batch."""
    with playing(module(**options)) as game:
        game.discriminator.requires_grad_(turn.discriminator)
        torch.manual_seed(5)
        x = torch.rand(BATCH, 3, CROP, CROP)
        game.play(x, torch.arange(BATCH), turn, 1.0)
        return gradients(game.network), gradients(game.discriminator)


@pytest.mark.parametrize("kind", ["pair", "patch"])
def test_no_gradient_crosses_the_cut(kind: str) -> None:
    """Not a bit of the other side's loss reaches a side, whoever has a turn."""
    options = {"discriminator": kind, "adversarial": "pair" if kind == "pair" else "hinge"}
    codec_alone, untouched = played(Turn(False, True), **options)
    assert all(g is None for g in untouched)
    untouched, discriminator_alone = played(Turn(True, False), **options)
    assert all(g is None for g in untouched)
    codec, discriminator = played(Turn(True, True), **options)
    assert same(codec, codec_alone)
    assert same(discriminator, discriminator_alone)
    assert any(g is not None and g.abs().max() > 0 for g in codec)
    assert all(g is not None for g in discriminator)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_gradient_at_the_reconstruction_is_what_was_asked_for(share: float) -> None:
    """Distortion's plus the adversary's, whose norm is a share of the former's."""
    with playing(module(adversarial_share=share)) as game:
        seen: list[Tensor] = []
        original = game.network.forward

        def watched(x: Tensor, noise: Noise) -> Any:
            output = original(x, noise)
            output.x_hat.register_hook(seen.append)
            return output

        game.network.forward = watched  # type: ignore[method-assign]
        x = torch.rand(BATCH, 3, CROP, CROP)
        game.play(x, torch.arange(BATCH), Turn(False, True), 1.0)
        output = original(x, Noise.of(game.seed, torch.arange(BATCH)))
        x_hat = output.x_hat.detach().requires_grad_()
        terms = game.loss(output._replace(x_hat=x_hat), x)
        (pull,) = torch.autograd.grad(256.0 * terms.distortion, x_hat)
        (total,) = seen
        assert float((total - pull).norm() / pull.norm()) == pytest.approx(share, abs=1e-5)


class AlwaysRight(torch.nn.Module):
    """Knows the order of the pair; the codec can do nothing about it."""

    sign = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, x_hat: Tensor, latent: Tensor, swapped: Tensor) -> Verdict:
        margin = self.sign + 0 * (self.weight * x_hat).mean((1, 2, 3)).view(-1, 1)
        return Verdict(margin, -margin)


class NeverRight(AlwaysRight):
    """As the discriminator of a perfect codec would do at best, and worse."""

    sign = -1.0


def test_where_the_discriminator_always_wins_the_codec_plays_alone(
    tmp_path: Path, shard_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    game = module(patience=20)
    game.discriminator = AlwaysRight()  # type: ignore[assignment]
    runner = trainer(tmp_path, 70)
    runner.fit(game, data(shard_folder))
    # 18 batches alone, 27 with both (see test_game.py), then the codec alone; the rules know a batch later.
    assert game.opt_step == runner.global_step == 70
    assert game.discriminator_steps == 19 + 27
    assert game.images_seen == BATCH * (19 + 70)
    assert game.gate.turn == Turn(False, True)
    assert capsys.readouterr().err.count("the codec is trained alone for 20 batches") == 1


def test_where_it_can_never_win_the_codec_waits_and_the_run_ends(
    tmp_path: Path, shard_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    game = module(patience=3)
    game.discriminator = NeverRight()  # type: ignore[assignment]
    runner = trainer(tmp_path, 10)
    before = [p.clone() for p in game.network.parameters()]
    with pytest.raises(GameError, match="trained alone for 30 batches"):
        runner.fit(game, data(shard_folder))
    assert game.opt_step == runner.global_step == 0
    assert game.discriminator_steps == 31
    assert all(map(torch.equal, before, game.network.parameters()))
    assert capsys.readouterr().err.count("the discriminator is trained alone for 3 batches") == 1


class Count(pl.Callback):
    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []

    def on_train_batch_end(self, runner: pl.Trainer, game: Any, *args: Any) -> None:
        for logger in runner.loggers:
            logger.counters.update(opt_step=game.opt_step)  # type: ignore[attr-defined]
        self.steps.append((game.opt_step, runner.global_step))


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
def test_steps_checkpoints_and_logs_count_the_codecs_steps_once(
    tmp_path: Path, shard_folder: Path
) -> None:
    """With batches of all three kinds: the gate's thresholds lie where a toy passes them."""
    game = module()
    game.discriminator = AlwaysRight()  # type: ignore[assignment]
    count = Count()
    saver = ModelCheckpoint(
        tmp_path, "{step}", every_n_train_steps=7, save_top_k=-1, save_last=False
    )
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    runner = trainer(tmp_path, 40, count, saver, logger=logger, log_every_n_steps=5)
    runner.fit(game, data(shard_folder))
    assert all(own == lightning for own, lightning in count.steps)
    assert len(count.steps) == 19 + 40
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "train/loss" in row]
    assert [row["opt_step"] for row in rows] == list(range(5, 41, 5))
    saved = sorted(int(path.stem.removeprefix("step=")) for path in tmp_path.glob("*.ckpt"))
    assert saved == [7, 14, 21, 28, 35]
    watched = {
        "gan/accuracy", "gan/gradient_distortion", "gan/gradient_adversarial", "rate/error",
        "rate/factor", "grad_norm/g_s", "grad_norm/g_a", "grad_norm/codec", "colour/red",
        "alarm/collapsed", "alarm/colour",
    }  # fmt: skip
    assert watched <= rows[0].keys()
    assert rows[0]["gan/discriminator_trained"] == 1
    assert rows[-1]["gan/discriminator_trained"] == 0


class Killed(Exception):
    pass


class Kill(pl.Callback):
    """Saves after a batch and ends everything during the next one."""

    def __init__(self, batch: int, path: Path) -> None:
        self.batch, self.path, self.seen = batch, path, 0

    def on_train_batch_end(self, runner: pl.Trainer, *args: Any) -> None:
        self.seen += 1
        if self.seen == self.batch:
            runner.save_checkpoint(self.path)

    def on_before_optimizer_step(self, *args: Any) -> None:
        if self.seen >= self.batch:
            raise Killed


def lively(**options: Any) -> GANCodec:
    """A game whose gate visits all three states within a hundred batches."""
    game = module(
        **{"gate_lower": 0.55, "gate_upper": 0.6, "discriminator_lr": 3e-3, "ema": 0.9, **options}
    )
    game.gate.momentum = 0.8
    return game


def final(runner: pl.Trainer, path: Path) -> dict[str, Any]:
    runner.save_checkpoint(path)
    content = torch.load(path, weights_only=True)
    return {key: content[key] for key in ("state_dict", "optimizer_states", "tucodec")}


@pytest.mark.parametrize("options", [{}, {"discriminator": "patch", "adversarial": "hinge"}])
def test_200_steps_killed_anywhere_end_like_the_straight_run(
    tmp_path: Path, shard_folder: Path, options: dict[str, Any]
) -> None:
    """Codec, discriminator, both optimisers, average, gate and controller, to the bit."""
    steps = 200 if not options else 30
    runner = trainer(tmp_path, steps)
    game = lively(**options)
    turns = set()
    rules = game._keep_rules
    game._keep_rules = lambda observed: (turns.add(observed.turn), rules(observed))  # type: ignore
    runner.fit(game, data(shard_folder))
    straight = final(runner, tmp_path / "straight.ckpt")
    assert game.opt_step == steps
    assert len(turns) >= 2

    path = tmp_path / "killed.ckpt"
    stop = random.Random(len(options)).randrange(1, steps)
    with pytest.raises(Killed):
        trainer(tmp_path, steps, Kill(stop, path)).fit(lively(**options), data(shard_folder))
    assert (
        torch.load(path, weights_only=True)["loops"]["fit_loop"]["epoch_progress"]["total"][
            "started"
        ]
        > 0
    )
    runner = trainer(tmp_path, steps)
    runner.fit(lively(seed=0, **options), data(shard_folder), ckpt_path=path, weights_only=True)
    resumed = final(runner, tmp_path / "resumed.ckpt")
    for key, value in straight.items():
        assert same(value, resumed[key]), key


def test_pieces_of_a_batch_add_up(tmp_path: Path, shard_folder: Path) -> None:
    """Accumulation: the same gradients as the whole batch, and no step more."""
    with playing(module(adversarial_weight=1e-3)) as game:
        x, turn = torch.rand(BATCH, 3, CROP, CROP), Turn(True, True)
        index = torch.arange(BATCH)
        game.play(x, index, turn, 1.0)
        whole = gradients(game.network), gradients(game.discriminator)
        game.zero_grad()
        for piece, places in zip(x.split([3, 1]), index.split([3, 1]), strict=True):
            game.play(piece, places, turn, len(piece) / BATCH)
        pieces = gradients(game.network), gradients(game.discriminator)
    for first, second in zip(whole, pieces, strict=True):
        for a, b in zip(first, second, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    game = module(pieces=2, gate_lower=0.0, gate_upper=2.0)
    runner = trainer(tmp_path, 3)
    runner.fit(game, data(shard_folder))
    assert game.opt_step == runner.global_step == game.discriminator_steps == 3


def test_under_bfloat16(tmp_path: Path, shard_folder: Path) -> None:
    game = module(gate_lower=0.0, gate_upper=2.0)
    trainer(tmp_path, 3, precision="bf16-mixed").fit(game, data(shard_folder))
    assert all(torch.isfinite(p).all() for p in game.parameters())
    assert game.opt_step == 3


def test_the_average_stands_still_once_a_gradient_is_not_finite(
    tmp_path: Path, shard_folder: Path
) -> None:
    """Nobody has asked yet, so that the game goes on: the average must not follow what it was before."""
    kept: dict[str, Tensor] = {}

    class Spoiled(GANCodec):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            if self.opt_step == 2 and optimizer is self.trainer.optimizers[0]:
                kept.update({name: p.detach().clone() for name, p in self.named_parameters()})
                for p in self.network.parameters():
                    if p.grad is not None:
                        p.grad.fill_(torch.nan)
            super().on_before_optimizer_step(optimizer)

    torch.manual_seed(0)
    game = Spoiled(**SETTINGS, gate_lower=0.0, gate_upper=2.0, ema=0.5)
    runner = trainer(tmp_path, 5, log_every_n_steps=100)
    with pytest.raises(NonFiniteLossError, match="step 2"):
        runner.fit(game, data(shard_folder))
    assert game.opt_step == 4  # the last step logs, and so asks
    assert [n for n, p in game.named_parameters() if not torch.equal(p, kept[n])] == []
    behind = dict(game.averaged.named_parameters())
    assert any(not torch.equal(p, behind[n]) for n, p in game.network.named_parameters())


def test_each_side_is_clipped(tmp_path: Path, shard_folder: Path) -> None:
    game = module(gate_lower=0.0, gate_upper=2.0, clip_norm=1e-3)
    norms: list[float] = []

    class Look(pl.Callback):
        def on_train_batch_end(self, runner: pl.Trainer, *args: Any) -> None:
            for optimizer in runner.optimizers:
                grads = [p.grad for g in optimizer.param_groups for p in g["params"]]
                norms.append(
                    float(torch.nn.utils.get_total_norm([g for g in grads if g is not None]))
                )

    trainer(tmp_path, 2, Look()).fit(game, data(shard_folder))
    assert norms == pytest.approx([1e-3] * 4, rel=1e-2)


def test_pictures_show_original_before_and_now(
    tmp_path: Path, shard_folder: Path, val_folder: Path
) -> None:
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    game = module(gate_lower=0.0, gate_upper=2.0, ema=0.5)
    options = {"val_check_interval": 2, "check_val_every_n_epoch": None, "logger": logger}
    trainer(tmp_path, 4, Count(), **options).fit(game, data(shard_folder, val_folder))
    names = sorted(path.name for path in (tmp_path / "images").glob("*.png"))
    assert names == [f"step-{step:08d}-{number}.png" for step in (2, 4) for number in (0, 1)]
    from lightning_tucodec.io.images import read_image

    picture = read_image(tmp_path / "images" / names[2])
    original, before, now = (picture[:, 101 * i : 101 * (i + 1)] for i in range(3))
    assert picture.shape == (75, 303, 3)
    assert (before != now).any()
    assert (original != before).any()
    (row, *_) = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "val/bpp" in row]
    assert "val/centres_used" in row


def test_the_average_is_what_is_exported(tmp_path: Path, shard_folder: Path) -> None:
    game = module(gate_lower=0.0, gate_upper=2.0, ema=0.9)
    runner = trainer(tmp_path, 3)
    runner.fit(game, data(shard_folder))
    weights = network_weights(final(runner, tmp_path / "x.ckpt"))
    assert game.averaged is not None
    assert same(weights, dict(game.averaged.state_dict()))
    assert not same(weights, dict(game.network.state_dict()))


def test_the_order_of_pairs_is_a_function_of_seed_and_position() -> None:
    game, other = module(seed=1), module(seed=2)
    index = torch.arange(1000)
    order = game.swapped(index)
    assert 400 < int(order.sum()) < 600
    assert torch.equal(game.swapped(index[500:]), order[500:])
    assert not torch.equal(order, other.swapped(index))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"discriminator": "triple"}, "triple"),
        ({"adversarial": "wasserstein"}, "wasserstein"),
        ({"discriminator_widths": []}, "widths"),
        ({"gate_lower": 0.9, "gate_upper": 0.8}, "gate_lower"),
        ({"ema": 1.0}, "ema"),
        ({"target_bpp": 0.0}, "target_bpp"),
    ],
)
def test_options_that_cannot_work(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        module(**options)


STEPS = int(os.environ.get("TUCODEC_GAN_STEPS", "40"))
"""Of the straight run of two processes; 200 in a long proof."""

SCENARIOS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "straight": ({}, {}, STEPS),
    "pieces": ({"pieces": 2}, {}, 5),
    "clipped": ({"clip_norm": 1e-3}, {}, 5),
    "bfloat16": ({"discriminator": "patch", "adversarial": "non_saturating"},
                 {"precision": "bf16-mixed"}, 5),
}  # fmt: skip
"""Options of the module, of the trainer, and steps of what two processes train together."""

_STOP = STEPS * 2 // 5


class Unbarred(pl.Callback):
    """In a step no rank waits at a barrier: under NCCL it would empty the queue of the GPU."""

    barrier = staticmethod(torch.distributed.barrier)

    def on_train_batch_start(self, *args: Any) -> None:
        def refuse(*_: Any, **__: Any) -> None:
            raise AssertionError("a barrier in a step")

        torch.distributed.barrier = refuse

    def on_train_batch_end(self, *args: Any) -> None:
        torch.distributed.barrier = self.barrier

    on_exception = on_train_batch_end


def _rank(rank: int, port: int, folder: str, shards: str) -> None:
    """All scenarios, and the first one killed and resumed, as one of two processes."""
    import warnings

    warnings.simplefilter("ignore")
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", GROUP_RANK="0",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test",
    )  # fmt: skip
    torch.set_num_threads(1)
    from pytorch_lightning.plugins.environments import TorchElasticEnvironment

    def fit(
        name: str, module_options: dict[str, Any], options: dict[str, Any], steps: int,
        *callbacks: pl.Callback, resume: str | None = None,
    ) -> None:  # fmt: skip
        game = lively(**module_options)
        runner = trainer(
            Path(folder), steps, Unbarred(), *callbacks, devices=2, strategy="ddp",
            plugins=[TorchElasticEnvironment()], **options,
        )  # fmt: skip
        runner.fit(game, data(Path(shards)), ckpt_path=resume, weights_only=True)
        own = {"state_dict": game.state_dict(), "gate": game.gate.state(), "rate": game.rate.state(),
               "optimizers": [o.state_dict() for o in runner.optimizers],
               "steps": (game.opt_step, runner.global_step)}  # fmt: skip
        torch.save(own, f"{folder}/{name}-{rank}.pt")

    for name, (module_options, options, steps) in SCENARIOS.items():
        fit(name, module_options, options, steps)
    path = f"{folder}/killed.ckpt"
    with contextlib.suppress(Killed):
        fit("killed", {}, {}, STEPS, Kill(_STOP, Path(path)))
    fit("resumed", {}, {}, STEPS, resume=path)
    torch.distributed.destroy_process_group()


def test_two_processes_stay_one_and_resume(tmp_path: Path, shard_folder: Path) -> None:
    """Two gloo processes: equal on both ranks throughout, and the killed run ends as the straight one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (port, str(tmp_path), str(shard_folder)), nprocs=2)

    def result(name: str, rank: int) -> dict[str, Any]:
        content: dict[str, Any] = torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True)
        return content

    for name, (_, _, steps) in SCENARIOS.items():
        first, second = result(name, 0), result(name, 1)
        assert same(first, second), name
        assert first["steps"] == (steps, steps)
    assert not (tmp_path / "killed-0.pt").exists()
    for rank in range(2):
        assert same(result("straight", rank), result("resumed", rank))


def test_fit_stops_and_resumes_the_game(
    tmp_path: Path, shard_folder: Path, val_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By signal, in the middle of a phase: weights, both optimisers, gate and metric lines, to the bit."""

    def words(name: str) -> list[str]:
        (tmp_path / name).mkdir()
        values = config(tmp_path / name, shard_folder, MICRO, steps=12)
        options = {"gate_lower": 0.55, "gate_upper": 0.6, "discriminator_widths": [8, 8],
                   "discriminator_lr": 1e-3, "recipe": "mse", "lmbda": 256.0}  # fmt: skip
        path = "lightning_tucodec.training.gan.GANCodec"
        values["model"] = {"class_path": path, "init_args": values["model"] | options}
        values["data"]["val_images"] = str(val_folder)
        values["trainer"]["log_every_n_steps"] = 3
        return ["fit", "--config", write(tmp_path / name, values)]

    assert main(words("straight")) == 0
    stopped = words("stopped")
    rules = GANCodec._keep_rules

    def interrupt(self: GANCodec, observed: Any) -> None:
        rules(self, observed)
        if self.opt_step == 6 and self.gate.turn.codec:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(GANCodec, "_keep_rules", interrupt)
        assert main(stopped) == 75
    (folder,) = runs(tmp_path / "stopped")
    assert state(folder)["tucodec"]["opt_step"] == 7
    assert main(stopped) == 0
    (straight,) = runs(tmp_path / "straight")
    for part in ("state_dict", "optimizer_states", "tucodec"):
        assert same(state(straight)[part], state(folder)[part]), part
    rows = [without_time(read_metrics(f / "metrics.jsonl")) for f in (straight, folder)]
    assert rows[0] == rows[1]
    assert [row["opt_step"] for row in rows[0] if "train/loss" in row] == [3, 6, 9, 12]
