"""What it costs a training that it can be interrupted: the identity of its run, and its checkpoints.

    python tools/bench_checkpoints.py                # a table, and outputs/bench-checkpoints.json

Trainings with and without a checkpoint are measured in pairs, one right after the other and each first in half of the
pairs, by the CPU seconds of this process, so that other work on the machine hardly counts. A checkpoint is written once
a minute, and takes at most a 300th of the time (kdlib/records/checkpoint.py); what one costs is measured by itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

import kdlib
from kdlib import lab, plots, profiles
from kdlib.data import ImageSet
from kdlib.records import artefacts, checkpoint
from kdlib.records.fingerprint import fingerprint

TARGET = 0.01  # of the training's time, at most
NETWORKS = ("digits_cnn", "wide_resnet14", "resnet50")  # of which one checkpoint is measured


def cpu_seconds(work: Callable[[], object]) -> float:
    """What one call takes of this process's CPU time."""
    start = time.process_time()
    work()
    return time.process_time() - start


def paired(images: ImageSet, recipe: kdlib.Recipe, network: str, pairs: int, folder: Path) -> dict[str, float]:
    """Trainings with and without a checkpoint: CPU seconds without, and the share that the others take more."""

    def once(path: Path | None) -> float:
        model = kdlib.build(network, images.classes, images.channels)
        train = partial(kdlib.train, model, images, F.cross_entropy, recipe, device="cpu", progress=False)
        return cpu_seconds(lambda: train(checkpoint=path))

    once(None)  # what is loaded at the first call
    plain, more = [], []
    for number in range(pairs):
        order = (None, folder / f"{number}.partial")[:: 1 if number % 2 else -1]
        took = {path: once(path) for path in order}
        with_checkpoint = next(seconds for path, seconds in took.items() if path)
        plain.append(took[None])
        more.append(with_checkpoint / took[None] - 1)
    found = lab.interval(np.array(more)[:, None])
    return {"pairs": pairs, "seconds": float(np.mean(plain)), "more": found.mean, "half": found.half}


def one_checkpoint(images: ImageSet, recipe: kdlib.Recipe, network: str, folder: Path) -> dict[str, float]:
    """CPU seconds for one checkpoint of a network: the median of those that a training writes, one after each epoch."""
    took, write = [], checkpoint.Checkpoint._write

    def timed(run: checkpoint.Checkpoint, history: dict) -> None:
        took.append(cpu_seconds(lambda: write(run, history)))

    path, model = folder / f"{network}.partial", kdlib.build(network, images.classes, images.channels)
    patched = {"CHECKPOINT_SECONDS": 0}
    with mock.patch.multiple(checkpoint, **patched), mock.patch.object(checkpoint.Checkpoint, "_write", timed):
        kdlib.train(model, images, F.cross_entropy, recipe, checkpoint=path, device="cpu", progress=False)
    return {"network": network, "mb": path.stat().st_size / 1e6, "seconds": float(np.median(took))}


def measure(pairs: int, epochs: int) -> dict:
    """Both, on the digits: the quick teacher's recipe with so many epochs, and one checkpoint of each network."""
    settings = kdlib.resolve("quick")
    images = kdlib.load_data(settings.dataset, limit=settings.limit).train
    recipe = dataclasses.replace(settings.teacher_recipe, epochs=epochs)
    few = dataclasses.replace(images, images=images.images[:64], labels=images.labels[:64])
    brief = dataclasses.replace(recipe, epochs=5, batch_size=64)
    model = kdlib.build(settings.teacher, images.classes, images.channels)
    identity = [cpu_seconds(lambda: fingerprint(model, images, F.cross_entropy, recipe)) for _ in range(20)]
    with tempfile.TemporaryDirectory() as name:
        return {
            "network": settings.teacher,
            "identity_seconds": float(np.median(identity)),
            **paired(images, recipe, settings.teacher, pairs, Path(name)),
            "checkpoints": [one_checkpoint(few, brief, network, Path(name)) for network in NETWORKS],
        }


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 1 if the interval lies above the target."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=40, help="of each training")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = measure(options.pairs, options.epochs)
    path = profiles.outputs_folder() / "bench-checkpoints.json"
    artefacts.save_json(path, found)
    rows = []
    for c in found["checkpoints"]:
        share = c["seconds"] / checkpoint.pause_after(c["seconds"])
        rows.append([c["network"], f"{c['mb']:.1f}", f"{1e3 * c['seconds']:.1f}", f"{share:.3%}"])
    print(plots.text_table(["checkpoint of", "MB", "CPU ms", "of the time"], rows))
    print(
        f"\nTo identify the run takes {1e3 * found['identity_seconds']:.1f} ms, once."
        f"\n{found['network']}, {found['seconds']:.2f} CPU seconds: with a checkpoint {found['more']:+.2%} "
        f"± {found['half']:.2%} (95 %, {found['pairs']} pairs; at most {TARGET:.0%} is wanted). Kept in {path}"
    )
    return int(found["more"] - found["half"] > TARGET)


if __name__ == "__main__":
    sys.exit(main())
