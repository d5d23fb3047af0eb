"""Two processes at once: neither mixes up the other's files, and no row is lost.

    python -m tests.together                # 200 pairs, a quarter of each kind: about a minute

Both of a pair start at the same moment, with one folder: two trainings that are the same, two trainings under one
name, two sets of soft labels under one name, or two experiments on one file of rows.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import kdlib
from kdlib.data import ImageSet
from kdlib.lab import RowStore
from kdlib.lab.rows import load
from kdlib.records import artefacts

KINDS = ("the same training", "trainings under one name", "soft labels under one name", "experiments on one file")
ROWS = 3  # of each of an experiment's two cases
WAIT = 120  # seconds after which a pair counts as hanging


def linear(classes: int, channels: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16 * channels, classes))


def toy() -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (24, 4, 4, 1), dtype=torch.uint8, generator=generator)
    statistics = {"mean": (0.5,), "std": (0.25,), "padding": 1, "flip": False}
    return ImageSet("toy/train", images, torch.arange(24) % 3, ("a", "b", "c"), **statistics)


def act(kind: str, member: int, folder: Path) -> object:
    """What one of the pair (0 or 1) does in `folder`, and what it gets."""
    data, own = toy(), 0 if kind == "the same training" else member
    if kind.endswith(("training", "trainings under one name")):
        recipe = kdlib.Recipe(epochs=2, batch_size=8, learning_rate=0.1, seed=own)
        trained = kdlib.load_or_train(folder, "student.pth", linear, data, F.cross_entropy, recipe, progress=False)
        return {name: value.tolist() for name, value in trained.model.state_dict().items()}, trained.history.loss
    if kind.startswith("soft labels"):
        torch.manual_seed(own)
        return kdlib.load_or_generate(folder, linear(3, 1), data, 2, progress=False).logits.tolist()
    store = RowStore(folder / "05_x.json")
    for case in ("a", "b"):
        name = f"{case} of {member}"
        store.measure(name, range(ROWS), lambda seed: {"accuracy": 0.1 * seed + member}, made_from={"of": member})
    return [(row["case"], row["seed"], row["accuracy"]) for row in store.finish()["rows"]]


def wrong(kind: str, folder: Path, results: list[object], expected: list[object]) -> list[str]:
    """In words, what is wrong with a pair's results and with what is in its folder."""
    found = [
        f"result {k} is another's"
        for k, (own, wanted) in enumerate(zip(results, expected, strict=True))
        if own != wanted
    ]
    if kind.startswith("experiments"):
        files = [folder / "05_x.json", *folder.glob("05_x.*.json")]  # a backup keeps what the other did not ask for
        there = {(row["case"], row["seed"], row["accuracy"]) for path in files for row in load(path)["rows"]}
        lost = len([row for own in expected for row in own if tuple(row) not in there])
        return found + ([f"{lost} rows are lost"] if lost else [])
    paths = [path.with_suffix("") for path in folder.glob("*.*.json")]
    found += [
        f"{p.name} has another's record" for p in paths if artefacts.record(p)["sha256"] != artefacts.file_digest(p)
    ]
    of_both = 1 if kind == "the same training" else 2
    return found + ([f"{len(paths)} files, expected {of_both}"] if len(paths) != of_both else [])


def member(number: int, barrier, tasks: list[tuple[str, Path]], results) -> None:
    """One of the two processes: its part of every pair, at the same moment as the other."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "the teacher agrees")  # it is not trained at all
    for k, (kind, folder) in enumerate(tasks):
        barrier.wait(WAIT)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            try:
                result = act(kind, number, folder)
            except Exception as error:
                result = repr(error)
        results.put((k, number, result, "is being made by process" in said.getvalue()))


def campaign(pairs: int) -> dict[str, Counter]:
    """So many pairs, the kinds in turn: by kind, how many there were, waited, trained twice, and what was wrong."""
    counts = {kind: Counter() for kind in KINDS}
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        root = Path(os.path.realpath(name))
        tasks = [(KINDS[k % len(KINDS)], root / str(k)) for k in range(pairs)]
        expected = {kind: [act(kind, number, root / kind / str(number)) for number in (0, 1)] for kind in KINDS}
        barrier, results = context.Barrier(2), context.Queue()
        members = [context.Process(target=member, args=(k, barrier, tasks, results), daemon=True) for k in (0, 1)]
        for process in members:
            process.start()
        found: dict[int, dict[int, object]] = {}
        for _ in range(2 * pairs):
            k, number, result, waited = results.get(timeout=WAIT)
            found.setdefault(k, {})[number] = result
            counts[tasks[k][0]]["waited"] += waited
        for process in members:
            process.join(WAIT)
        for k, (kind, folder) in enumerate(tasks):
            counts[kind]["pairs"] += 1
            for what in wrong(kind, folder, [found[k][0], found[k][1]], expected[kind]):
                counts[kind][f"WRONG: {what}"] += 1
    return counts


def main() -> int:
    warnings.filterwarnings("ignore", "the teacher agrees")
    start = time.perf_counter()
    counts = campaign(200)
    for kind, found in counts.items():
        print(f"{kind:30}" + ", ".join(f"{number} {what}" for what, number in found.items()))
    bad = sum(number for found in counts.values() for what, number in found.items() if what.startswith("WRONG"))
    pairs = sum(found["pairs"] for found in counts.values())
    print(f"{pairs} pairs, {bad} wrong")
    from tests.campaigns import record  # not above: pytest imports this file from its own folder

    record("together", {"pairs": pairs, "wrong": bad}, time.perf_counter() - start)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
