"""Hostile streams: mutated `.tuc` files must end in a named error or a valid image.

    python -m tests.campaigns.streams --count 20000 --seed 1

Case i of a seed is always the same bytes, so a campaign that was interrupted goes on where it
stopped, and a finding is reproduced by its number (`--only I`). The decoder runs in a child
process, with strips of STRIP_POSITIONS so that small files have several, and tries to salvage what it
refuses. Each case must end within LIMIT_SECONDS (of the wall or of the processor, whichever is less:
the machine may be busy with other things) and with at most LIMIT_MEMORY × the memory of an honest decode:
how far the peak of the resident memory rises during the case, against the costliest file of the corpus,
or, where a sound header claims a larger image than that one, against as much more as its pixels are.
Counts go to docs/campaigns.json under the key
"streams"; the exit status is 1 when any case broke a rule.
"""

import argparse
import collections
import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import importlib
import json
import multiprocessing
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from lightning_tucodec.coding.container import CodecKind, Container, pack, unpack
from lightning_tucodec.errors import TucodecError
from lightning_tucodec.io.temporary import atomic_write

RESULTS = Path(__file__).parents[2] / "docs" / "campaigns.json"
LIMIT_SECONDS = 1.0
LIMIT_MEMORY = 1.5
STRIP_POSITIONS = 64  # instead of 8192: four strips in 256×256 pixels
HANG_SECONDS = 30.0  # then the child is ended and the case counts as a hang
SAVE_EVERY = 500

Decode = Callable[[bytes], Any]
Mutation = Callable[[np.random.Generator, Sequence[bytes]], bytes]


# --- Mutations: without the checksums repaired -----------------------------------------------


def _pick(rng: np.random.Generator, corpus: Sequence[bytes]) -> bytes:
    return corpus[rng.integers(len(corpus))]


def _cut(rng: np.random.Generator, data: bytes | bytearray) -> int:
    """A position in `data`; every other time within the first 64 bytes, where the header is."""
    end = min(64, len(data)) if rng.random() < 0.5 else len(data)
    return int(rng.integers(end + 1))


def bit_flips(rng: np.random.Generator, corpus: Sequence[bytes]) -> bytes:
    """One to eight flipped bits."""
    data = bytearray(_pick(rng, corpus))
    for _ in range(int(rng.integers(1, 9))):
        data[_cut(rng, data[:-1])] ^= 1 << int(rng.integers(8))
    return bytes(data)


def truncation(rng: np.random.Generator, corpus: Sequence[bytes]) -> bytes:
    """A file cut off anywhere."""
    data = _pick(rng, corpus)
    return data[: _cut(rng, data)]


def splice(rng: np.random.Generator, corpus: Sequence[bytes]) -> bytes:
    """The beginning of one file and the end of another, or of the same."""
    first, second = _pick(rng, corpus), _pick(rng, corpus)
    return first[: _cut(rng, first)] + second[_cut(rng, second) :]


def insertion(rng: np.random.Generator, corpus: Sequence[bytes]) -> bytes:
    """Random bytes put in somewhere, the end included."""
    data = _pick(rng, corpus)
    at = _cut(rng, data)
    return data[:at] + rng.bytes(int(rng.integers(1, 40))) + data[at:]


def raw_header(rng: np.random.Generator, corpus: Sequence[bytes]) -> bytes:
    """Header bytes overwritten as they stand."""
    data = bytearray(_pick(rng, corpus))
    for _ in range(int(rng.integers(1, 5))):
        data[int(rng.integers(min(len(data), 24)))] = int(rng.choice([0, 1, 127, 128, 255]))
    return bytes(data)


# --- Mutations: every checksum valid ---------------------------------------------------------


def _strips(container: Container) -> list[bytes]:
    return [strip for strip in container.strips if strip is not None]


def header_edit(rng: np.random.Generator, corpus: Sequence[bytes]) -> bytes:
    """Another size, kind, model, flag or number of strips over an honest payload."""
    container = unpack(_pick(rng, corpus))
    strips = _strips(container)
    field = rng.choice(["size", "near size", "huge", "kind", "model", "flags", "strips"])
    if field == "size":
        change: dict[str, Any] = {
            "width": int(rng.integers(1, 2048)),
            "height": int(rng.integers(len(strips), 2048)),
        }
    elif field == "near size":
        change = {
            "width": max(1, container.width + int(rng.integers(-20, 21))),
            "height": max(len(strips), container.height + int(rng.integers(-20, 21))),
        }
    elif field == "huge":
        long, short = int(rng.integers(2048, 65_536)), int(rng.integers(len(strips), 4096))
        change = (
            {"width": long, "height": short}
            if rng.random() < 0.5
            else {"width": short, "height": long}
        )
    elif field == "kind":
        change = {"kind": CodecKind(int(rng.integers(len(CodecKind))))}
    elif field == "model":
        change = {"model_id": rng.bytes(8)}
    elif field == "flags":
        change = {"flags": int(rng.integers(16))}
    else:
        cut = int(rng.integers(len(strips[0]) + 1))
        change = {"strips": (strips[0][:cut], strips[0][cut:], *strips[1:])}
    return pack(dataclasses.replace(container, **change))


def wrong_payload(rng: np.random.Generator, corpus: Sequence[bytes]) -> bytes:
    """Strips that no encoder wrote under checksums that say all is well."""
    container = unpack(_pick(rng, corpus))
    strips = _strips(container)
    at = int(rng.integers(len(strips)))
    strip = strips[at]
    way = rng.choice(["random", "zeros", "ones", "flips", "cut", "longer", "foreign", "empty"])
    if way == "random":
        strip = rng.bytes(int(rng.integers(2 * len(strip) + 8)))
    elif way in ("zeros", "ones"):
        strip = (b"\0" if way == "zeros" else b"\xff") * int(rng.integers(2 * len(strip) + 8))
    elif way == "flips":
        flipped = bytearray(strip or b"\0")
        for _ in range(int(rng.integers(1, 9))):
            flipped[int(rng.integers(len(flipped)))] ^= 1 << int(rng.integers(8))
        strip = bytes(flipped)
    elif way == "cut":
        strip = strip[: int(rng.integers(len(strip) + 1))]
    elif way == "longer":
        strip += rng.bytes(int(rng.integers(1, 200)))
    elif way == "foreign":
        strip = _strips(unpack(_pick(rng, corpus)))[0]
    else:
        strip = b""
    strips[at] = strip
    return pack(dataclasses.replace(container, strips=tuple(strips)))


MUTATIONS: dict[str, Mutation] = {
    function.__name__: function
    for function in (
        bit_flips,
        truncation,
        splice,
        insertion,
        raw_header,
        header_edit,
        wrong_payload,
    )
}
CHECKSUMS_VALID = {"header_edit", "wrong_payload"}


def mutated(seed: int, case: int, corpus: Sequence[bytes]) -> tuple[str, bytes]:
    """Case number `case` of a campaign: the name of its mutation and its bytes."""
    rng = np.random.default_rng([seed, case])
    name = list(MUTATIONS)[case % len(MUTATIONS)]
    return name, MUTATIONS[name](rng, corpus)


# --- The decoder ---------------------------------------------------------------------------------


def decode(data: bytes) -> Any:
    """`lightning_tucodec.decompress` with short strips; what it refuses is salvaged, then refused."""
    import lightning_tucodec
    from lightning_tucodec.codecs import library
    from lightning_tucodec.codecs.learned import latents

    latents.STRIP_POSITIONS = STRIP_POSITIONS
    try:
        return lightning_tucodec.decompress(data)
    except TucodecError:
        with contextlib.suppress(TucodecError):
            container = unpack(data, salvage=True)
            library.load_by_id(container.model_id).salvage(container)
        raise


# --- One case --------------------------------------------------------------------------------


def outcome(decode: Decode, name: str, data: bytes, corpus: Sequence[bytes]) -> str:
    """What a decoder made of a mutated stream.

    Returns:
        "image" or the class of the named error; a broken rule begins with "!".
    """
    try:
        image = decode(data)
    except TucodecError as error:
        if "\n" in str(error):
            return f"!{type(error).__name__} of several lines"
        return type(error).__name__
    except Exception as error:  # any other kind is the finding
        return f"!{type(error).__name__}: {error}"[:200].replace("\n", " ")
    if data not in corpus and name not in CHECKSUMS_VALID:
        return "!a damaged file was accepted"
    container = unpack(data)
    size = getattr(image, "size", None)
    if size is not None and size != (container.width, container.height):
        return f"!an image of {size} for {container.width}×{container.height}"
    return "image"


def _memory(field: str) -> int:
    """VmRSS or VmHWM (the peak of VmRSS since `_start_measuring`), in bytes."""
    status = Path("/proc/self/status").read_text()
    match = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    assert match
    return 1024 * int(match[1])


def _start_measuring() -> int:
    """Give freed memory back, forget the peak, and return what is in use now, in bytes."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def measured(use: Callable[[], str]) -> tuple[str, float, int]:
    """What a use returns, its seconds (of the wall or the processor) and how far it raised the memory."""
    idle = _start_measuring()
    start = time.perf_counter(), time.process_time()
    result = use()
    seconds = min(time.perf_counter() - start[0], time.process_time() - start[1])
    return result, seconds, _memory("VmHWM") - idle


def _claimed_pixels(data: bytes) -> int:
    """Area of the image that a file with sound checksums claims, else 0."""
    try:
        container = unpack(data)
    except TucodecError:
        return 0
    return container.width * container.height


def _load(target: str) -> Decode:
    module, _, name = target.partition(":")
    decode: Decode = getattr(importlib.import_module(module), name)
    return decode


def _child(pipe: Connection, target: str, corpus: list[bytes], seed: int, cases: range) -> None:
    """Decode the corpus for the limits, then send (outcome, seconds, bytes, ratio) of each case."""
    decode = _load(target)
    torch.set_num_threads(1)
    decode(min(corpus, key=len))  # models loaded, kernels compiled
    honest = 0
    for data in corpus:
        idle = _start_measuring()
        decode(data)
        honest = max(honest, _memory("VmHWM") - idle)
    pixels = max(map(_claimed_pixels, corpus))
    pipe.send(None)
    for case in cases:
        name, data = mutated(seed, case, corpus)
        result, seconds, peak = measured(functools.partial(outcome, decode, name, data, corpus))
        fair = max(honest, 1 << 20) * max(1, _claimed_pixels(data) / pixels)
        pipe.send((result, seconds, peak, peak / fair))


def run(
    target: str, corpus: list[bytes], seed: int, cases: range
) -> Iterator[tuple[str, float, int, float]]:
    """(outcome, seconds, peak bytes, peak over the honest one) of each case; survives any child."""
    return survive(_child, (target, corpus, seed), cases)


def survive(
    child_of: Callable[..., None],
    arguments: tuple[Any, ...],
    cases: range,
    hang_seconds: float | None = None,
) -> Iterator[tuple[str, float, int, float]]:
    """What `child_of(pipe, *arguments, cases)` sends of each case, after None when it is ready."""
    hang_seconds = hang_seconds or HANG_SECONDS
    context = multiprocessing.get_context("spawn")
    while cases:
        ours, theirs = context.Pipe()
        child = context.Process(target=child_of, args=(theirs, *arguments, cases))
        child.start()
        theirs.close()
        try:
            ours.recv()  # it is ready; EOFError: the child has said why not
            while cases:
                finding = None
                if not ours.poll(hang_seconds):
                    finding = ("!hang", hang_seconds, 0, 0.0)
                else:
                    try:
                        result = ours.recv()
                    except EOFError:
                        child.join()
                        finding = (f"!the process ended with status {child.exitcode}", 0.0, 0, 0.0)
                cases = cases[1:]
                yield finding or result
                if finding:
                    break  # and go on in a new child
        finally:
            child.kill()
            child.join()
            ours.close()


# --- The campaign ----------------------------------------------------------------------------


def make_corpus(name: str | None) -> tuple[str, list[bytes]]:
    """A model's name and honest files of it: waves and noise of several strengths, odd sizes."""
    import lightning_tucodec
    from lightning_tucodec.codecs.learned import latents

    latents.STRIP_POSITIONS = STRIP_POSITIONS
    model = lightning_tucodec.load(name or next(iter(lightning_tucodec.models())))
    rng = np.random.default_rng(0)
    corpus = []
    for width, height in [(16, 16), (97, 61), (128, 192), (256, 256), (320, 200)]:
        rows, columns = np.mgrid[:height, :width].astype(np.float64)
        image = np.stack(
            [
                128 + 100 * np.sin(columns / rng.uniform(5, 40) + rows / rng.uniform(5, 40))
                for _ in range(3)
            ],
            axis=-1,
        )
        image += rng.normal(0, rng.uniform(0, 25), image.shape)
        corpus.append(model.compress(image.clip(0, 255).astype(np.uint8)))
    return model.name, corpus


def merge(path: Path, key: str, value: dict[str, Any]) -> None:
    """Set one key of a JSON object file, atomically, and keep the others."""
    document = json.loads(path.read_text()) if path.exists() else {}
    document[key] = value
    with atomic_write(path, "w") as stream:
        json.dump(document, stream, indent=2, sort_keys=True)
        stream.write("\n")


def campaign(
    target: str, model: str, corpus: list[bytes], seed: int, count: int, results: Path
) -> int:
    """Run what is left of a campaign; returns the number of broken rules."""
    identity = {
        "decoder": target,
        "model": model,
        "seed": seed,
        "corpus": hashlib.sha256(b"".join(corpus)).hexdigest()[:16],
    }
    limits = {"seconds": LIMIT_SECONDS, "memory_ratio": LIMIT_MEMORY}
    return tally(
        results, "streams", identity, list(MUTATIONS), limits, LIMIT_SECONDS, LIMIT_MEMORY, count,
        lambda cases: run(target, corpus, seed, cases),
    )  # fmt: skip


def tally(
    results: Path,
    key: str,
    identity: dict[str, Any],
    names: Sequence[str],
    limits: dict[str, float],
    seconds_limit: float,
    memory_limit: float,
    count: int,
    work: Callable[[range], Iterator[tuple[str, float, int, float]]],
) -> int:
    """Count the outcomes of a campaign, going on from what `results` holds of it under `key`.

    Args:
        results: a JSON file of campaigns.
        key: of this one.
        identity: what makes its cases; another one begins anew.
        names: of the kinds of cases, which take turns.
        limits: as they are noted.
        seconds_limit: of a case.
        memory_limit: of the last entry that `work` gives.
        count: cases in all.
        work: outcome, seconds, peak bytes and their ratio to what is fair, of each case.

    Returns:
        The number of broken rules.
    """
    fresh: dict[str, Any] = {
        **identity,
        "cases": 0,
        "outcomes": {},
        "by_mutation": {},
        "broken": [],
        "slowest_seconds": 0.0,
        "largest_memory_ratio": 0.0,
        "largest_memory_bytes": 0,
        "limits": limits,
    }
    before = json.loads(results.read_text()).get(key, {}) if results.exists() else {}
    state = before if {k: before.get(k) for k in identity} == identity else fresh
    outcomes = collections.Counter(state["outcomes"])
    by_mutation = collections.Counter(state["by_mutation"])
    cases = range(state["cases"], count)
    progress = tqdm(cases, initial=cases.start, total=count, unit="case", file=sys.stderr)
    for case, (result, seconds, peak, memory) in zip(progress, work(cases), strict=True):
        if not result.startswith("!") and seconds > seconds_limit:
            result = f"!{result} after {seconds:.1f} s"
        if not result.startswith("!") and memory > memory_limit:
            result = f"!{result} with {memory:.1f} × the memory"
        outcomes["broken" if result.startswith("!") else result] += 1
        by_mutation[names[case % len(names)]] += 1
        if result.startswith("!"):
            state["broken"].append([case, names[case % len(names)], result[1:]])
        state["slowest_seconds"] = round(max(state["slowest_seconds"], seconds), 3)
        state["largest_memory_ratio"] = round(max(state["largest_memory_ratio"], memory), 2)
        state["largest_memory_bytes"] = max(state["largest_memory_bytes"], peak)
        state.update(cases=case + 1, outcomes=dict(outcomes), by_mutation=dict(by_mutation))
        if (case + 1) % SAVE_EVERY == 0 or case + 1 == count:
            merge(results, key, state)
    return len(state["broken"])


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=20_000, help="cases in all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--decoder", default="tests.campaigns.streams:decode", help="module:name")
    parser.add_argument("--model", help="of the corpus; the first known one by default")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", type=int, help="run this case alone, here, and print it")
    arguments = parser.parse_args(argv)
    model, corpus = make_corpus(arguments.model)
    if arguments.only is not None:
        name, data = mutated(arguments.seed, arguments.only, corpus)
        result = outcome(_load(arguments.decoder), name, data, corpus)
        print(f"case {arguments.only}, {name}, {len(data)} bytes: {result}")
        return int(result.startswith("!"))
    broken = campaign(
        arguments.decoder, model, corpus, arguments.seed, arguments.count, arguments.results
    )
    print(f"{arguments.count} streams, {broken} broken rules; {arguments.results.name} updated")
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
