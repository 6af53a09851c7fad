"""What a training step asks of the host: values read back from the device, data sent to it.

A step that does neither keeps a GPU's queue full. No GPU is needed to see it: `Traffic` watches a step on the
CPU, where reading a value and making a tensor of host data are operations as well.
"""

import traceback
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.plugins.environments import LightningEnvironment
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

READS = {
    "aten._local_scalar_dense", "aten.item", "aten.nonzero", "aten.equal", "aten.is_nonzero",
    "aten.masked_select", "aten._unique2", "aten.unique_dim",
}  # fmt: skip
"""Operations whose result depends on values: the host waits for them."""

COPIES = {"aten.lift_fresh", "aten.lift_fresh_copy"}
"""What `torch.tensor(data)` ends with."""

CALLS = {Tensor.cpu, Tensor.tolist}
"""On the CPU no operation shows that they read."""


class _Calls(TorchFunctionMode):
    def __init__(self, reads: Counter[str]) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in CALLS:
            self.reads[_asker(func.__name__)] += 1
        return func(*args, **(kwargs or {}))


class Traffic(TorchDispatchMode):
    """A context that counts, by the line that asks.

    Attributes:
        reads: from the device, `file:line operation` to number.
        copies: to it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self._calls = ExitStack()

    def __enter__(self) -> "Traffic":
        self._calls.enter_context(_Calls(self.reads))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._calls.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func).rpartition(".")[0]
        tensors = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, Tensor)]
        crosses = "copy" in name and len({tensor.device.type for tensor in tensors}) > 1
        if name in READS:
            self.reads[_asker(name)] += 1
        elif name in COPIES or crosses:
            self.copies[_asker(name)] += 1
        return result


def _asker(name: str) -> str:
    """The innermost line of this package, of Lightning or of CompressAI."""
    for frame in reversed(traceback.extract_stack()):
        for package in ("lightning_tucodec/", "pytorch_lightning/", "compressai/"):
            _, found, path = frame.filename.rpartition(package)
            if found:
                return f"{package}{path}:{frame.lineno} {name}"
    return name


class Watch(pl.Callback):
    """Watches each batch from its start until the next one starts."""

    def __init__(self) -> None:
        self.batches: list[Traffic] = []
        self._open = ExitStack()

    def on_train_batch_start(self, *args: Any) -> None:
        self._open.close()
        self.batches.append(self._open.enter_context(Traffic()))

    def on_train_end(self, *args: Any) -> None:
        self._open.close()

    on_exception = on_train_end


def watched(
    module: pl.LightningModule, batches: Iterable[dict[str, Tensor]], **options: Any
) -> list[Traffic]:
    """A fit of one step a batch."""
    watch = Watch()
    data: DataLoader[Any] = DataLoader(list(batches), batch_size=None)  # type: ignore[arg-type]
    settings: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_steps": 1000, "max_epochs": 1, "logger": False,
        "log_every_n_steps": 1000, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "num_sanity_val_steps": 0, "limit_val_batches": 0,
        "plugins": [LightningEnvironment()],
    }  # fmt: skip
    pl.Trainer(callbacks=[watch], **{**settings, **options}).fit(module, data)
    return watch.batches
