"""Write the golden streams of all shipped models anew: `python -m tests.golden.make`.

Needed after shipped weights have changed, and only then: a stream that changes while the weights do not
is a broken promise. For every model `NAME.tuc`, the file of a small photograph; `NAME.png`, what a decoder
shows; `NAME.json`, the SHA-256 of its symbols.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import lightning_tucodec as tuc
from lightning_tucodec.codecs.cards import SHIPPED
from lightning_tucodec.codecs.learned.codec import TucModel
from lightning_tucodec.codecs.library import load_any
from lightning_tucodec.coding.container import unpack
from lightning_tucodec.io.images import write_png
from tests.support import photo

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The shipped models that code images."""
    paths = sorted(SHIPPED.glob("*.safetensors"))
    return [path.stem for path in paths if isinstance(load_any(path), TucModel)]


def fingerprint(symbols: NDArray[np.int32]) -> str:
    """SHA-256 of symbols as little-endian int32."""
    return hashlib.sha256(symbols.astype("<i4").tobytes()).hexdigest()


def read(model: TucModel, data: bytes) -> NDArray[np.int32]:
    """Symbols of a file."""
    container = unpack(data)
    return model.of(container).read(container)[0]


def main() -> None:
    """The command."""
    for name in names():
        model = tuc.load(name)
        if model.levels > 1:
            model = model.at(2.5)  # between two levels, where biases are interpolated
        data = model.compress(photo("chelsea.png", 150, 117))
        (FOLDER / f"{name}.tuc").write_bytes(data)
        write_png(FOLDER / f"{name}.png", np.array(model.decompress(data)))
        record = {"model": model.id.hex(), "symbols": fingerprint(read(model, data))}
        (FOLDER / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        print(f"{name}: {len(data)} bytes")


if __name__ == "__main__":
    main()
