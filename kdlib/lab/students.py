"""The published students of profile full, and those beside them that ``tools/students.py`` publishes, as tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from kdlib.evaluate import load_results, percent
from kdlib.profiles import outputs_folder
from kdlib.records.documents import NUMBER, load_document, mismatch
from kdlib.records.fetch import clone_folder, published_file

_RUN = {"candidate": str, "kind": str, "role": str, "network": str, "parameters": int, "size_mb": NUMBER}
_RUN |= {"seeds": [int], "validation_accuracy": [NUMBER], "seconds": [NUMBER], "device": str, "recipe": dict}
FORM = {"profile": str, "dataset": str, "runs": [_RUN], "record": {"tried": [str], "below": int}}
HEADER = ["network", "parameters", "file, MB", "alone", "distilled", "gain, points", "seeds"]
RECORD_HEADER = ["network", "parameters", "file, MB", "validation accuracy", "test accuracy", "seeds"]


def published_students(profile: str = "full") -> dict | None:
    """The document that the clone publishes at a profile; None if there is none.

    Raises:
        ValueError: the file is not what was published.
    """
    if clone_folder() is None:  # where what is fetched can be older or newer than this kdlib
        return None
    try:
        path = published_file(profile, "students.json", outputs_folder() / profile)
    except FileNotFoundError:
        return None
    return load_students(path)


def load_students(path: Path) -> dict:
    """A document that ``tools/students.py`` has written; ValueError if it is none."""
    mend = "publish it again (python tools/students.py publish), or restore it"
    document = load_document(path, "file of students", mend)
    if wrong := mismatch(document, FORM):
        raise ValueError(f"{path} is not a file of students ({wrong}): {mend}")
    return document


def published_results(profile: str = "full") -> dict | None:
    """The results of a profile's own networks that the clone publishes; None if there are none."""
    path = (clone := clone_folder()) and clone / "book" / "published" / profile / "results.json"
    return load_results(path) if path and path.exists() else None


def student_rows(document: Mapping | None, results: Mapping | None = None) -> tuple[list[str], list[list[str]]]:
    """Header and rows, one per student: test accuracy alone and distilled, and the gain, paired by seed.

    Those that were tried for the record are in :func:`record_rows`. There are no rows without a document.

    Args:
        document: the students beside the book's own.
        results: those of the book, as ``results.json`` has them; they come first.
    """
    by_network: dict[str, dict[str, Mapping]] = {}
    runs = [run for run in results["runs"] if run["role"] != "teacher"] if results else []
    runs += [run for run in document["runs"] if run["kind"] == "students"] if document else []
    for run in runs:
        by_network.setdefault(_name(run), {})[run["role"]] = run
    pairs = [(roles["student"], roles["distilled"]) for roles in by_network.values() if len(roles) == 2]
    rows = []
    for alone, distilled in pairs:
        gain = 100 * np.subtract(distilled["accuracy"], alone["accuracy"]).mean()
        accuracies = [percent(run["accuracy"]) for run in (alone, distilled)]
        rows.append([*_sizes(alone), *accuracies, f"{gain:+.2f}", str(len(alone["seeds"]))])
    return HEADER, rows


def record_rows(document: Mapping | None) -> tuple[list[str], list[list[str]]]:
    """Header and rows, one per candidate for the record, the best on the validation images first.

    The test set was read for the chosen one, and for none that was never chosen: "–".
    """
    runs = [run for run in document["runs"] if run["kind"] == "record"] if document else []
    rows = []
    for run in sorted(runs, key=lambda run: -np.mean(run["validation_accuracy"])):
        tested = percent(run["accuracy"]) if "accuracy" in run else "–"
        rows.append([*_sizes(run), percent(run["validation_accuracy"]), tested, str(len(run["seeds"]))])
    return RECORD_HEADER, rows


def _name(run: Mapping) -> str:
    return run["candidate"] if "candidate" in run else run["network"]


def _sizes(run: Mapping) -> list[str]:
    return [_name(run), f"{run['parameters']:,}", f"{run['size_mb']:.2f}"]
