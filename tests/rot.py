"""Every change of a file that kdlib wrote is noticed: flip one bit, or cut the file off, and load it again.

    python -m tests.rot                    # 2,800 flips and 700 truncations over all kinds of files: about a minute

The outcomes: *refused* (an error that names the file), *not used* (it was renamed to a backup, and would be made
again), *other copy* (a checkpoint gives way to the one before it), *harmless* (what was read is what was written), and
*silent* (something else was read, and nothing said so), of which there must be none.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from kdlib import evaluate
from kdlib.data import ImageSet
from kdlib.lab import RowStore
from kdlib.lab.rows import load
from kdlib.records import artefacts, fetch
from kdlib.records.checkpoint import Checkpoint, previous
from kdlib.records.documents import load_document, save_document
from kdlib.soft_labels import load_soft_labels
from kdlib.sources.stored import read_stored

OUTCOMES = ("refused", "not used", "other copy", "harmless", "silent")
HARMLESS = (
    "Harmless: a bit that makes 1E-05 of 1e-05; the line break at the end of a JSON file cut off. What was read is "
    "what was written."
)
RUN = {"role": "student", "network": "mine", "parameters": 9, "size_mb": 0.5, "seeds": [0, 1]}  # of results.json
RUN |= {"accuracy": [0.5, 0.625], "nll": [1.25, 1e-05], "latency_ms": {"CPU": {"1": 0.125}}}


@dataclass
class Kind:
    """A kind of file: where it lies, and how it is read."""

    path: Path
    read: Callable[[], object]  # what it holds, to be compared; None if it is not used


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))


def plain(value: object) -> object:
    """Tensors and arrays as bytes with their type and shape, so that == compares everything."""
    if isinstance(value, torch.Tensor):
        value = value.numpy()
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def kinds(folder: Path) -> dict[str, Kind]:
    """One file of each kind that kdlib writes, in `folder`; the clone of what is published lies there too."""
    random_ = np.random.RandomState(0)
    made_from = {"network": "mine", "recipe": {"epochs": 3, "learning_rate": 1e-05}, "data": "toy"}
    more = {"history": {"loss": [1.5, 0.25, 1e-05]}, "provenance": artefacts.provenance("cpu", 1.5)}
    weights, soft, rows = folder / "student.pth", folder / "soft_labels.npy", folder / "05_x.json"
    results, figures, partial = folder / "results.json", folder / "measured.json", folder / "student.1a2b.partial"

    artefacts.save_weights(weights, network(), fingerprint=made_from, **more)

    def read_weights():
        path = artefacts.find(folder, weights.name, made_from)
        return path and [artefacts.load_weights(path, network()).state_dict(), artefacts.record(path)]

    images = torch.from_numpy(random_.randint(0, 256, (30, 8, 8, 1)).astype(np.uint8))
    names, statistics = ("a", "b", "c"), {"mean": (0.3,), "std": (0.2,), "padding": 1, "flip": False}
    data = ImageSet("toy/train", images, torch.arange(30) % 3, names, **statistics)
    logits = random_.randn(2, 30, 3).astype(np.float16)
    artefacts.save_array(soft, logits, fingerprint={"data": data.identity, "views": 2}, **more)

    def read_soft_labels():
        path = artefacts.find(folder, soft.name, {"data": data.identity, "views": 2})
        return path and [load_soft_labels(path, data).logits, artefacts.record(path)]

    store = RowStore(rows, profile="quick", title="An experiment")
    correct = random_.rand(50) < 0.7
    store.measure("alone", (0, 1), lambda seed: {"accuracy": correct, "nll": 0.1 + seed}, made_from=made_from)
    store.finish()
    evaluate.save_results(results, "quick", "toy", [RUN])
    save_document(figures, {"pairs": 7, "share": 0.25, "small": 1e-05})

    def state_of_training(seed: int) -> Checkpoint:
        torch.manual_seed(seed)
        model = nn.Linear(6, 4)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        model(torch.ones(2, 6)).sum().backward()
        optimizer.step()
        generator = torch.Generator().manual_seed(seed)
        return Checkpoint(partial, "key", [generator], model=model, optimizer=optimizer)

    for seed in (1, 2):
        state_of_training(seed)._write({"loss": [0.5] * seed})

    def read_checkpoint():
        state = state_of_training(3)
        history = state.resume()
        return [history, *(part.state_dict() for part in state.parts.values()), state.generators[0].get_state()]

    arrays = {f"{s}_images": random_.randint(0, 256, (20, 4, 4, 1)).astype(np.uint8) for s in ("train", "test")}
    arrays |= {f"{split}_labels": np.arange(20) % 3 for split in ("train", "test")} | {"class_names": np.array(names)}
    artefacts.save_arrays(folder / "mnist.npz", arrays, fingerprint={"dataset": "mnist"})

    clone = folder / "clone"
    published = clone / "book" / "published" / "quick"
    published.mkdir(parents=True)
    histories, recorded = json.dumps({"student.pth": more["history"]}).encode(), io.BytesIO()
    np.save(recorded, logits)
    artefacts.save_bytes(published / "histories.json", histories, fingerprint=made_from, **more)
    artefacts.save_bytes(published / "logits.npy", recorded.getvalue(), fingerprint=made_from, **more)

    def read_published(name: str):
        clone_folder, fetch.clone_folder = fetch.clone_folder, lambda: clone
        try:
            path = fetch.published_file("quick", name, folder)
        finally:
            fetch.clone_folder = clone_folder
        content = json.loads(path.read_text()) if name.endswith("json") else artefacts.load_array(path)
        return [content, artefacts.record(path)]

    reading = {
        "weights": (weights, read_weights),
        "soft labels": (soft, read_soft_labels),
        "data set": (folder / "mnist.npz", lambda: read_stored("mnist", folder)),
        "published histories": (published / "histories.json", lambda: read_published("histories.json")),
        "published logits": (published / "logits.npy", lambda: read_published("logits.npy")),
    }
    found = {name: Kind(*known) for name, known in reading.items()}
    found |= {f"record of {name}": Kind(artefacts.record_path(path), read) for name, (path, read) in reading.items()}
    return found | {
        "rows": Kind(rows, lambda: load(rows)),
        "results": Kind(results, lambda: evaluate.load_results(results)),
        "measured figures": Kind(figures, lambda: load_document(figures, "file of figures", "delete it")),
        "checkpoint": Kind(partial, read_checkpoint),
    }


def outcome(kind: Kind, folder: Path, content: bytes, wanted: object) -> str:
    """What comes of reading the file with that content. The folder is as it was afterwards."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    kind.path.write_bytes(content)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            found = plain(kind.read())
    except (ValueError, FileNotFoundError) as error:
        named = kind.path.name.removesuffix(".json") in str(error)
        return "refused" if named else "silent"
    finally:
        for path in folder.rglob("*"):
            if path.is_file() and path not in before:
                path.unlink()
        for path, original in before.items():
            if not path.exists() or path.read_bytes() != original:
                path.write_bytes(original)
    if found is None:
        return "not used" if "is not what this run needs" in said.getvalue() else "silent"
    if found == wanted:
        return "harmless"
    return "other copy" if previous(kind.path).exists() and "from the one before it" in said.getvalue() else "silent"


def flipped(content: bytes, random_: random.Random) -> bytes:
    changed = bytearray(content)
    changed[random_.randrange(len(changed))] ^= 1 << random_.randrange(8)
    return bytes(changed)


def truncated(content: bytes, random_: random.Random) -> bytes:
    return content[: random_.randrange(len(content))]


def campaign(flips: int, truncations: int, seed: int = 0) -> dict[tuple[str, str], Counter]:
    """So many of each over all kinds of files: ``(kind, "flip" or "truncation") -> how often which outcome``."""
    counts, random_ = {}, random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(os.path.realpath(name))
        every = kinds(folder)
        for kind, how in every.items():
            content, wanted = how.path.read_bytes(), plain(how.read())
            for change, number in ((flipped, flips // len(every)), (truncated, truncations // len(every))):
                tried = (outcome(how, folder, change(content, random_), wanted) for _ in range(number))
                counts[kind, "flip" if change is flipped else "truncation"] = Counter(tried)
    return counts


def main() -> int:
    start = time.perf_counter()
    counts = campaign(2800, 700)
    print(f"{'':32}{'':12}" + "".join(f"{name:>12}" for name in OUTCOMES))
    for (kind, change), found in counts.items():
        print(f"{kind:32}{change:12}" + "".join(f"{found[name]:12,}" for name in OUTCOMES))
    totals = {"flip": Counter(), "truncation": Counter()}
    for (_, change), found in counts.items():
        totals[change] += found
    for change, total in totals.items():
        print(f"{'all':32}{change:12}" + "".join(f"{total[name]:12,}" for name in OUTCOMES))
    print(HARMLESS)
    from tests.campaigns import record  # not above: pytest imports this file from its own folder

    of_both = totals["flip"] + totals["truncation"]
    tried = {f"{change}s": total.total() for change, total in totals.items()}
    outcomes = {name.replace(" ", "_"): of_both[name] for name in OUTCOMES}
    figures = {"kinds": len({kind for kind, _ in counts}), **tried, **outcomes}
    record("rot", figures, time.perf_counter() - start)
    return int(of_both["silent"] > 0)


if __name__ == "__main__":
    sys.exit(main())
