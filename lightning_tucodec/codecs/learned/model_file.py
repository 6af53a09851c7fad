"""Exported models: one safetensors file with weights, integer tables and the model card.

    network.*      g_a, g_s, h_a (convolution weights in half precision by default), the quantiser and the
                   prior of z in single precision
    entropy.*      the entropy networks as integers (`coding.fixed_point`); held once, in this form
    laplace.*      the centres' tables of y; categorical.*, medians: those of z

The metadata field `tucodec` is JSON: format, name, config, card. A model's id is the first 8 bytes of the
SHA-256 of its config and tensors; the name and the card can be edited without changing it.
"""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_tucodec.codecs.cards import FORMAT, UNFIT, describe, identity
from lightning_tucodec.coding.categorical import CategoricalTables, build_cdf
from lightning_tucodec.coding.container import QUALITY_STEPS
from lightning_tucodec.coding.fixed_point import FRACTION_BITS, IntegerEntropyModel
from lightning_tucodec.coding.integer_weights import (
    at_level,
    integer_layout,
    quantise_network,
    restore_network,
)
from lightning_tucodec.coding.laplace import LaplaceTables, build_tables
from lightning_tucodec.coding.wavefront import Z_LIMIT, EntropyModel
from lightning_tucodec.errors import ModelFileError, one_line
from lightning_tucodec.io.once import once_property
from lightning_tucodec.io.temporary import atomic_write
from lightning_tucodec.nn.codec import CodecConfig, TucodecVAE, config_from_dict, config_to_dict

_TABLES = ("laplace.edges", "laplace.inverse_scale", "laplace.tail", "categorical.cumulative")

_TAIL = 2.0**-20
"""The table of z covers each channel up to this probability; the rest is escaped."""

_INTEGER_PARTS = ("h_s.", "context.", "entropy_parameters.", "levels.bias")


_FILLS = frozenset({"kaiming_normal_", "kaiming_uniform_", "normal_", "uniform_", "zero_", "fill_"})


class _WithoutValues(TorchFunctionMode):
    """Nothing is filled with first values.

    That takes most of the time on a device without storage, where PyTorch imports its compiler for it.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _FILLS:
            return args[0] if args else kwargs["tensor"]
        if func is torch.arange and all(type(bound) is int for bound in args):
            return torch.empty(len(range(*args)), dtype=kwargs.get("dtype", torch.int64))
        return func(*args, **kwargs)


@contextmanager
def shapes_only() -> Iterator[None]:
    """Networks that are built in this block have shapes alone: no storage and no values.

    So a small file cannot claim a large network.
    """
    with torch.device("meta"), _WithoutValues():
        yield


def check_tensors(
    expected: Mapping[str, tuple[Sequence[int], torch.dtype | None]], tensors: Mapping[str, Tensor]
) -> None:
    """Compare a file's tensors with shapes and types that are known before anything is allocated.

    Args:
        expected: by name; where the type is None, any floating one with finite values.
        tensors: the file's.

    Raises:
        ValueError: one is missing, too much, or another than expected.
    """
    if odd := sorted(expected.keys() ^ tensors.keys()):
        raise ValueError(f"{odd[0]} is {'missing' if odd[0] in expected else 'unknown'}")
    for name, (shape, dtype) in expected.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {tuple(shape)}")
        if tensor.dtype != dtype and (dtype is not None or not tensor.is_floating_point()):
            raise ValueError(f"{name} holds {tensor.dtype}")
        if dtype is None and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} holds a value that is not finite")


def check_depths(depths: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
    """Refuse numbers of layers that a file with so few tensors cannot have.

    Raises:
        ValueError: one is too large.
    """
    if max(depths) > len(tensors):
        raise ValueError(f"{max(depths)} blocks in a file of {len(tensors)} tensors")


@dataclass(frozen=True)
class ModelFile:
    """An exported model in memory.

    Attributes:
        name: how commands call it.
        config: of the network, as plain types.
        tensors: by the names described above.
        card: data and their terms, steps, λ and its convention, expected rate and distortion, ….
        id: 8 bytes, computed from config and tensors.
    """

    name: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    card: dict[str, Any]
    id: bytes = field(init=False)

    def __post_init__(self) -> None:
        """Compute the id."""
        arrays = {name: tensor.contiguous().numpy() for name, tensor in self.tensors.items()}
        object.__setattr__(self, "id", identity(self.config, arrays.items()))

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        description = {
            "format": FORMAT, "name": self.name, "config": self.config, "card": self.card,
        }  # fmt: skip
        metadata = {"tucodec": json.dumps(description, ensure_ascii=False)}
        with atomic_write(path) as stream:
            stream.write(save({k: v.contiguous() for k, v in self.tensors.items()}, metadata))

    @classmethod
    def load(cls, path: Path) -> "ModelFile":
        """Read a file.

        Raises:
            ModelFileError: it is missing, damaged, or of another kind or format.
        """
        try:
            with safe_open(path, framework="pt") as content:
                description = describe(path, content.metadata())
                tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
            return cls(description.name, description.config, tensors, description.card)
        except FileNotFoundError:
            raise ModelFileError(f"{path}: no such model file") from None
        except (OSError, SafetensorError, *UNFIT) as error:
            raise ModelFileError(f"{path}: not an exported model ({one_line(error)})") from None

    @once_property
    def checked(self) -> CodecConfig:
        """The configuration, once every tensor has the shape that it asks for.

        The network is built without storage first, so that a small file cannot claim a large one.

        Raises:
            ModelFileError: they do not agree.
        """
        try:
            config = config_from_dict(self.config)
            shape, hyper = config.transform, config.hyper
            depths = [shape.head_blocks, shape.attention_trunk, shape.attention_mask]
            check_depths([*shape.blocks, *depths, config.context.levels], self.tensors)
            with shapes_only():
                network = TucodecVAE(config)
            expected: dict[str, tuple[Sequence[int], torch.dtype | None]] = {
                f"network.{key}": (value.shape, None)
                for key, value in network.state_dict().items()
                if not key.startswith(_INTEGER_PARTS)
            }
            for key, layout in integer_layout(network).items():
                expected[f"entropy.{key}"] = layout
            z = (hyper.latent_channels,)
            lengths = {"categorical.offset": z, "medians": z, "laplace.centres": (config.centres,)}
            expected |= {key: (length, torch.int32) for key, length in lengths.items()}
            for key in _TABLES:  # of any length; what makes them up checks the rest
                expected[key] = (self.tensors[key].shape, torch.int32)
            check_tensors(expected, self.tensors)
        except UNFIT as error:
            raise ModelFileError(
                f"model {self.name}: its content is inconsistent ({one_line(error)})"
            ) from None
        return config

    def network(self) -> TucodecVAE:
        """The floating-point network, in eval mode.

        Raises:
            ModelFileError: the file's content is inconsistent.
        """
        config = self.checked
        with torch.random.fork_rng(devices=[]):  # the first values are drawn, and replaced
            network = TucodecVAE(config)
        weights = _part(self.tensors, "network")
        network.load_state_dict({k: v.float() for k, v in weights.items()}, strict=False)
        restore_network(network, _part(self.tensors, "entropy"))
        return network.eval()

    def entropy_model(self, step: int | None = None) -> EntropyModel:
        """The integers that decide bits.

        Args:
            step: the level of a variable-rate network in 1/QUALITY_STEPS; None: the highest.

        Raises:
            ModelFileError: the file's content is inconsistent.
        """
        config = self.checked
        integers = _part(self.tensors, "entropy")
        if config.levels > 1:
            highest = QUALITY_STEPS * (config.levels - 1)
            integers = at_level(integers, highest if step is None else step)
        laplace = {k: v.numpy() for k, v in _part(self.tensors, "laplace").items()}
        table = _part(self.tensors, "categorical")
        try:
            return EntropyModel(
                IntegerEntropyModel(integers),
                LaplaceTables(**laplace),
                CategoricalTables(
                    table["cumulative"].numpy().astype(np.uint32), table["offset"].numpy()
                ),
                self.tensors["medians"].numpy(),
            )
        except (*UNFIT, ModelFileError) as error:
            raise ModelFileError(
                f"model {self.name}: its content is inconsistent ({one_line(error)})"
            ) from None


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Tensors below a prefix, without it."""
    start = f"{prefix}."
    return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}


@torch.no_grad()
def _hyperlatent_tables(network: TucodecVAE) -> dict[str, Tensor]:
    """Tables of z around the medians: cells until the tail is below _TAIL, then the escape."""
    prior = network.factorized_prior
    medians = prior.medians()
    values = torch.arange(-Z_LIMIT, Z_LIMIT + 1, dtype=torch.float32)
    points = (medians[:, None] + values).T[:, :, None, None]
    mass = prior.likelihood(points)[:, :, 0, 0].T.double()
    outside = 1 - torch.stack(
        [mass[:, Z_LIMIT - r : Z_LIMIT + r + 1].sum(1) for r in range(Z_LIMIT)], dim=1
    )
    reach = int((outside > _TAIL).sum(1).max().clamp(1, Z_LIMIT - 1))
    inside = mass[:, Z_LIMIT - reach : Z_LIMIT + reach + 1]
    escape = (1 - inside.sum(1, keepdim=True)).clamp(min=_TAIL)
    cumulative = build_cdf(torch.cat([inside, escape], dim=1).numpy())
    return {
        "categorical.cumulative": torch.from_numpy(cumulative.astype(np.int32)),
        "categorical.offset": torch.full((prior.channels,), -reach, dtype=torch.int32),
        "medians": torch.round(medians.double() * 2**FRACTION_BITS).to(torch.int32),
    }


@torch.no_grad()
def freeze(
    network: TucodecVAE,
    name: str,
    card: dict[str, Any],
    weight_dtype: torch.dtype = torch.float16,
) -> ModelFile:
    """Turn a network into an exported model: weights, integer tables, card.

    Args:
        network: trained or not; left as it is.
        name: how commands will call the model.
        card: plain types.
        weight_dtype: of the convolution weights of g_a, g_s and h_a.

    Raises:
        ModelFileError: a weight is not finite, a layer's sums would not be exact, or the centres cannot be
            held.
    """
    network = copy.deepcopy(network).cpu()
    tensors: dict[str, Tensor] = {}
    for key, value in network.state_dict().items():
        if not bool(value.isfinite().all()):
            raise ModelFileError(f"model {name}: network.{key} holds a value that is not finite")
        if not key.startswith(_INTEGER_PARTS):
            halved = value.ndim == 4 and key.startswith(("g_a.", "g_s.", "h_a."))
            tensors[f"network.{key}"] = value.detach().to(
                weight_dtype if halved else torch.float32, copy=True
            )
    integers = quantise_network(network)
    tensors.update({f"entropy.{key}": value for key, value in integers.items()})
    try:
        laplace = build_tables(network.quantizer.centres().double().numpy())
    except ValueError as error:
        raise ModelFileError(f"model {name}: {error}") from None
    for key, table in laplace.items():
        tensors[f"laplace.{key}"] = torch.from_numpy(np.ascontiguousarray(table))
    tensors.update(_hyperlatent_tables(network))
    config = json.loads(json.dumps(config_to_dict(network.config)))
    model = ModelFile(name, config, tensors, card)
    for level in range(network.config.levels):
        model.entropy_model(
            QUALITY_STEPS * level
        )  # proves the bounds now rather than at the first use
    return model
