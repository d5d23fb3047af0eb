"""How far the same training differs: once more, with other threads, on another processor, by one rounding, by a seed.

    python -m tests.determinism             # some hundred trainings of the quick profile's teacher: ten minutes

Each way of training runs in processes of its own. Another processor is simulated by one that keeps to AVX2, or to
no vector instructions of its own, which changes the order of sums.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import kdlib

ROOT = Path(__file__).resolve().parent.parent
SEEDS = range(20)
FEW = range(5)  # seeds of what is compared with the same seed
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
PLAIN = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}
# name: seeds, threads, environment, dtype, which weights are moved by one unit in the last place (None: none)
WAYS = {
    "seeds": (SEEDS, 1, {}, "float32", None),
    "once more": (FEW, 1, {}, "float32", None),
    "two threads": (FEW, 2, {}, "float32", None),
    "AVX2": (FEW, 1, AVX2, "float32", None),
    "no vectors": (FEW, 1, PLAIN, "float32", None),
    "one rounding": ([0], 1, {}, "float32", SEEDS),
    "float64": (FEW, 1, {}, "float64", None),
    "float64, AVX2": (FEW, 1, AVX2, "float64", None),
}


def trained_logits(seed: int, dtype: torch.dtype, moved: int | None, epochs: int | None = None) -> np.ndarray:
    """The quick profile's teacher's logits for the test images (N, C).

    Args:
        moved: the number of the weight of the first layer that is moved by one unit in the last place at the start.
        epochs: None for the profile's.
    """
    settings = kdlib.resolve("quick")
    data = kdlib.load_data(settings.dataset, **settings.images)
    recipe = replace(settings.teacher_recipe, seed=seed, epochs=epochs or settings.teacher_recipe.epochs)
    model = kdlib.build(settings.teacher, data.train.classes, data.train.channels, seed=seed).to(dtype)
    if moved is not None:
        weight = next(model.parameters()).data.flatten()
        weight[moved] = torch.nextafter(weight[moved], weight[moved] + 1)
    kdlib.train(model, data.train, F.cross_entropy, recipe, progress=False)
    return kdlib.predict_logits(model, data.test).numpy()


def work(out: Path, dtype: str, seeds: Iterable[int], moved: Iterable[int] | None, epochs: int | None) -> None:
    """What a process does: it trains, and leaves the logits (trainings, N, C)."""
    torch.set_default_dtype(getattr(torch, dtype))
    pairs = [(seed, weight) for seed in seeds for weight in ([None] if moved is None else moved)]
    made = [trained_logits(seed, torch.get_default_dtype(), weight, epochs) for seed, weight in pairs]
    np.save(out, np.stack(made))


def run(way: str, folder: Path, epochs: int | None = None, few: int | None = None) -> np.ndarray:
    """The logits (trainings, N, C) of a way of training, made in a process of its own."""
    seeds, threads, environment, dtype, moved = WAYS[way]
    seeds, moved = list(seeds)[:few], moved if moved is None else list(moved)[:few]
    out = folder / f"{way}.npy"
    call = f"determinism.work({str(out)!r}, {dtype!r}, {seeds}, {moved}, {epochs})"
    code = f"import torch; from tests import determinism; torch.set_num_threads({threads}); {call}"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | environment, cwd=ROOT, text=True)
    if done.returncode:
        raise RuntimeError(f"the trainings {way!r} failed")
    return np.load(out)


def campaign(epochs: int | None = None, few: int | None = None) -> dict[str, float]:
    """The figures; accuracies in points. `few` limits the number of seeds and of moved weights."""
    with tempfile.TemporaryDirectory() as name:
        made = {way: run(way, Path(name), epochs, few) for way in WAYS}
    settings = kdlib.resolve("quick")
    labels = kdlib.load_data(settings.dataset, **settings.images).test.labels.numpy()

    def accuracy(logits: np.ndarray) -> np.ndarray:
        return 100 * (logits.argmax(-1) == labels).mean(-1)

    figures = {
        "images": len(labels),
        "trainings": sum(map(len, made.values())),
        "accuracy": accuracy(made["seeds"]).mean(),
        "spread over seeds": accuracy(made["seeds"]).std(ddof=1),
        "spread over roundings": accuracy(made["one rounding"]).std(ddof=1),
    }
    for way in ("once more", "two threads", "AVX2", "no vectors", "float64, AVX2"):
        base = made["float64" if way.startswith("float64") else "seeds"][: len(made[way])]
        figures |= {
            f"{way}: identical": sum(map(np.array_equal, made[way], base)),
            f"{way}: of": len(base),
            f"{way}: logits": np.abs(made[way] - base).max(),
            f"{way}: predictions": 100 * (made[way].argmax(-1) != base.argmax(-1)).mean(),
            f"{way}: accuracy": np.abs(accuracy(made[way]) - accuracy(base)).max(),
        }
    return {name: float(f"{value:.4g}") for name, value in figures.items()}


def main() -> int:
    start = time.perf_counter()
    figures = campaign()
    for name, value in figures.items():
        print(f"{name:30}{value:12.6g}")
    from tests.campaigns import record  # not above: pytest imports this file from its own folder

    record("determinism", figures, time.perf_counter() - start)
    return int(figures["once more: identical"] < figures["once more: of"])


if __name__ == "__main__":
    sys.exit(main())
