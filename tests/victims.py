"""What tests/kill.py kills within Python; as a command, a process that starts them, with PyTorch imported already.

It reads lines of JSON (which, and in which folder), forks, prints the child's number, and at its end its exit status.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from together import toy
from torch import nn

import kdlib
from kdlib.lab import RowStore, TrainingSetup, train_setups
from kdlib.records import checkpoint

DISTIL = partial(kdlib.distillation_loss, temperature=4.0, alpha=0.1)


def with_dropout(classes: int, channels: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(16 * channels, classes))


def with_batch_norm(classes: int, channels: int) -> nn.Module:
    convolution = nn.Conv2d(channels, 4, 3, padding=1)
    return nn.Sequential(convolution, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, classes))


def training(folder: Path) -> None:
    """A teacher with dropout, its soft labels and a distilled student."""
    data, recipe = toy(), kdlib.Recipe(epochs=12, batch_size=4, learning_rate=0.1)
    train = partial(kdlib.load_or_train, folder, data=data, recipe=recipe, device="cpu")
    teacher = train("teacher.pth", with_dropout, loss_fn=F.cross_entropy).model
    soft = kdlib.load_or_generate(folder, teacher, data, 9, device="cpu")
    train("student.pth", with_batch_norm, loss_fn=DISTIL, targets=soft)


def experiment(folder: Path) -> None:
    """Rows of an experiment: four students trained together, then two of them one by one."""
    data, recipe = toy(), kdlib.Recipe(epochs=12, batch_size=4, learning_rate=0.05)
    cases = {f"rate {k}": TrainingSetup(with_batch_norm, data, F.cross_entropy, recipe) for k in (1, 2)}
    store = RowStore(folder / "05_x.json")
    train_setups(store, cases, (0, 1), {"test": data}, batched=True)
    train_setups(store, {"alone": cases["rate 1"]}, (2, 3), {"test": data})
    store.finish()


def main() -> None:
    """Start what is asked for, one after the other, with a checkpoint at every epoch."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "the teacher agrees")
    checkpoint.CHECKPOINT_SECONDS = 0
    print("ready", flush=True)
    for line in sys.stdin:
        name, folder = json.loads(line)
        if not (child := os.fork()):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            {"training": training, "experiment": experiment}[name](Path(folder))
            os._exit(0)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
