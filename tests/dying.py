"""A process that dies at one of its file operations, played in this one: for each of them, what the next one finds."""

import builtins
import contextlib
import importlib
import io
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from kdlib import Recipe, evaluate, load_or_generate, load_or_train
from kdlib.lab import RowStore, TrainingSetup, train_setups
from kdlib.records import artefacts

checkpoints = importlib.import_module("kdlib.records.checkpoint")

CHANGING = ("replace", "unlink", "fsync", "mkdir")  # of os


class Died(BaseException):
    """The process is gone: nothing of it catches this."""


class Operations:
    """How many file operations there were."""

    count = 0


@contextlib.contextmanager
def dies_at(number: float) -> Iterator[Operations]:
    """In the block, the file operation of that number raises :class:`Died`, and so does every one after it.

    So what would tidy up afterwards does not either. A file that was to be opened for writing is left half written.
    """
    operations = Operations()

    def counted(function, name=None):
        def operation(*args, **kwargs):
            mode = kwargs.get("mode", args[1] if len(args) > 1 else "r")
            if name == "open" and (isinstance(args[0], int) or not set(mode) & set("wax+")):
                return function(*args, **kwargs)
            operations.count += 1
            if operations.count >= number:
                if name == "open" and operations.count == number:
                    with function(args[0], "wb") as file:
                        file.write(b"half of wh")
                raise Died
            return function(*args, **kwargs)

        return operation

    with contextlib.ExitStack() as stack:
        for name in CHANGING:
            stack.enter_context(mock.patch.object(os, name, counted(getattr(os, name))))
        for module in (builtins, io):
            stack.enter_context(mock.patch.object(module, "open", counted(module.open, "open")))
        yield operations


# --- what dies -------------------------------------------------------------------------------------------------------

RECIPE = Recipe(epochs=2, batch_size=16, learning_rate=0.1)


def linear(classes: int, channels: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, classes))


def student(folder, data, recipe=RECIPE):
    """Weights and history of a student, trained or loaded."""
    trained = load_or_train(folder, "student.pth", linear, data, F.cross_entropy, recipe, progress=False)
    return {name: value.tolist() for name, value in trained.model.state_dict().items()}, trained.history.loss


def soft_labels(folder, data, seed=0):
    torch.manual_seed(seed)
    return load_or_generate(folder, linear(data.classes, data.channels), data, 2, progress=False).logits.tolist()


def rows(folder, _, rate=0.1):
    store = RowStore(folder / "05_x.json")
    store.measure("a", (0, 1), lambda seed: {"accuracy": rate + seed}, made_from={"rate": rate})
    return [(row["seed"], row["accuracy"]) for row in store.finish()["rows"]]


def program(folder, data):
    """Rows of students that are trained together."""
    store = RowStore(folder / "05_x.json")
    train_setups(
        store, {"a": TrainingSetup(linear, data, F.cross_entropy, RECIPE)}, (0, 1), {"test": data}, batched=True
    )
    return [(row["seed"], row["sha256"]) for row in store.finish()["rows"]]


def results(folder, _, accuracy=0.5):
    path = folder / "results.json"
    run = {"role": "student", "network": "mine", "parameters": 9, "size_mb": 0.5, "seeds": [0]}
    run |= {"accuracy": [accuracy], "latency_ms": {}}
    evaluate.save_results(path, "quick", "digits", [run])
    return evaluate.load_results(path)["runs"]


OTHER = replace(RECIPE, seed=1)
# by name: what was there before, and what the process that dies is about to do
SITUATIONS: dict[str, tuple[list[Callable], Callable]] = {
    "a student": ([], student),
    "a student in place of another": ([student], partial(student, recipe=OTHER)),
    "a student whose backup comes back": ([student, partial(student, recipe=OTHER)], student),
    "soft labels": ([], soft_labels),
    "soft labels in place of others": ([soft_labels], partial(soft_labels, seed=1)),
    "rows": ([], rows),
    "rows in place of others": ([rows], partial(rows, rate=0.2)),
    "rows of a program": ([], program),
    "results": ([], results),
    "results in place of others": ([results], partial(results, accuracy=0.6)),
}


def crash_points(situation: str, folder: Path, data) -> Iterator[list[str]]:
    """For each file operation of a situation, what is wrong after a death at it, in words; checkpoints at every epoch.

    The same is done once more after the death, and then what was there before: both must come out as without it, no
    file may lie beside the record of another, and nothing unfinished may be left.
    """
    before, act = SITUATIONS[situation]
    start, whole = folder / "start", folder / "whole"
    start.mkdir(parents=True)
    with mock.patch.object(checkpoints, "CHECKPOINT_SECONDS", 0):
        for earlier in before:
            earlier(start, data)
        shutil.copytree(start, whole)
        with dies_at(float("inf")) as operations:
            wanted = act(whole, data)
        earlier_wanted = [earlier(whole, data) for earlier in before]
        recorded = [path for known in whole.glob("*.*.json") if (path := known.with_suffix("")).exists()]
        good = {artefacts.digest(artefacts.record(p)["fingerprint"]): artefacts.file_digest(p) for p in recorded}
        for number in range(1, operations.count + 1):
            tried = folder / str(number)
            shutil.copytree(start, tried)
            with contextlib.suppress(Died), dies_at(number):
                act(tried, data)
                raise AssertionError(f"operation {number} of {operations.count} did not end it")
            wrong = mixed_up(tried, good)
            wrong += [] if act(tried, data) == wanted else ["another outcome"]
            wrong += mixed_up(tried, good)
            wrong += (
                [] if [earlier(tried, data) for earlier in before] == earlier_wanted else ["another earlier outcome"]
            )
            wrong += mixed_up(tried, good)
            # but for temporary files of dead processes, and this one lives
            wrong += [f"{path.name} is left" for path in tried.glob("[!.]*.partial*")]
            names = {path.name for path in whole.iterdir()}
            left = [path.name for path in tried.glob("[!.]*") if path.suffix != ".json" and path.name not in names]
            wrong += [f"{name} is left" for name in left]  # rows may have a backup more
            shutil.rmtree(tried)
            yield wrong


def mixed_up(folder: Path, good: dict[str, str]) -> list[str]:
    """Which files lie beside the record of another; `good` is the SHA-256 of the file of each fingerprint."""
    pairs = [
        (path, artefacts.record(path)) for known in folder.glob("*.*.json") if (path := known.with_suffix("")).exists()
    ]
    return [
        f"{path.name} has another's record"
        for path, found in pairs
        if not found["sha256"] == artefacts.file_digest(path) == good[artefacts.digest(found["fingerprint"])]
    ]
