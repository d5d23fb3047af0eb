"""Recomputes reported figures from what was saved: those of a run, or those that are published.

python tools/verify.py --profile quick                # outputs/quick/results.json, from the saved weights
python tools/verify.py --published --profile full     # book/published/full/results.json, from what is published
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from notebooks import BOOK, Failed, Refused, chapters, choices, exit_status

import book
import kdlib
from kdlib import evaluate, profiles, published
from kdlib.models import NETWORKS
from kdlib.records import artefacts
from kdlib.soft_labels import load_soft_labels

TOLERANCE = 0.0005  # 0.05 point: on another device, half precision rounds otherwise
SOFT_LABELS_OFF = 0.03  # share of their size by which a view may be off, for the same reason


def verify(options: argparse.Namespace) -> None:
    """Recompute the results of a run, or the published ones; Failed if a figure is not reproduced."""
    if options.published and options.params:
        raise Refused(f"--params {options.params!r} with --published: what is published was run without parameters")
    profile = book.resolve(options.profile, book.read_parameters(options.params, chapters()))
    try:
        wrong, path = (recompute_published if options.published else recompute)(profile)
    except (OSError, ValueError) as error:  # kdlib's own message about a file that is missing or damaged
        raise Failed(str(error)) from error
    if wrong:
        again = f"`make publish PROFILE={profile.name}` publishes both again" if options.published else ""
        raise Failed("\n".join([f"what was saved and what {path} reports differ:", *wrong, *filter(None, [again])]))
    print(f"all figures of {path} are reproduced")


def recompute(profile: profiles.Profile) -> tuple[list[str], Path]:
    """What is not reproduced of a run's ``results.json`` from its saved weights, in words; and that file."""

    def saved(name: str) -> Path:  # a run with parameters uses whatever fits of the run without
        path, base = profile.folder / name, artefacts.base_folder(profile.folder) / name
        return path if path.exists() else base

    data = kdlib.load_data(profile.dataset, limit=profile.limit)
    wrong = [f"{split.name}: a class is missing" for split in data if len(split.labels.unique()) < split.classes]
    reported = profile.folder / "results.json"
    for role, network, seed, figures in rows(reported, profile):
        path = saved(profile.file(role, network, seed))
        model = artefacts.load_weights(path, kdlib.build(network, data.test.classes, data.test.channels))
        scores = evaluate.evaluate(model, data.test)
        if not np.isfinite(artefacts.record(path)["history"]["loss"]).all():
            wrong.append(f"{path.name}: its training loss was not finite")
        wrong += compared(path.name, scores, figures)
        if role == "teacher":
            logits = load_soft_labels(saved("soft_labels.npy"), data.train).logits
            data.train.resolve_views(len(logits))  # raises if there are not as many
            off = [difference(model, data.train, view, of_view) for view, of_view in enumerate(logits)]
            worst = int(np.argmax(np.nan_to_num(off, nan=np.inf)))
            if not off[worst] <= SOFT_LABELS_OFF:
                wrong.append(f"soft_labels.npy: the logits of view {worst} are off by {off[worst]:.1%} of their size")
            print(f"soft_labels.npy: {tuple(logits.shape)}, views off by {off[worst]:.2%} at most", flush=True)
    return wrong, reported


def difference(model: torch.nn.Module, images: kdlib.data.ImageSet, view: int, logits: torch.Tensor) -> float:
    """By what share of their size the logits (N, C) of a view differ from what the network gives now.

    By their typical size, not the largest: in half precision a few of a million logits are well off.
    """
    now = kdlib.predict_logits(model, images, view=view)
    return ((now - logits.float()).norm() / now.norm()).item()


def recompute_published(profile: profiles.Profile) -> tuple[list[str], Path]:
    """What is not reproduced of the published results from the published logits and weights; and the file of results.

    A network without published logits or weights is left out, and a line says so.
    """
    reported = BOOK / "published" / profile.name / "results.json"
    if not reported.exists():
        raise Failed(f"profile {profile.name} is not published (no {reported}): `make publish PROFILE={profile.name}`")
    if artefacts.record_path(reported).exists():
        artefacts.check_content(reported)
    data, wrong = kdlib.load_data(profile.dataset), []
    logits = published.recorded_logits(profile, data)
    for role, network, seed, figures in rows(reported, profile):
        file = profile.file(role, network, seed)
        weights = role != "teacher" and (reported.parent / file).exists()
        if file in logits:
            scores = evaluate.scores(logits[file]["test"], data.test.labels)
            wrong += compared(f"logits of {file}", scores, figures)
        if weights:
            path = published.published_file(profile.name, file, profile.folder)
            model = artefacts.load_weights(path, kdlib.build(network, data.test.classes, data.test.channels))
            accuracy = {"accuracy": figures["accuracy"]}  # calibration depends on digits that half precision drops
            wrong += compared(file, evaluate.evaluate(model, data.test), accuracy)
        if file not in logits and not weights:
            print(f"{file}: neither logits nor weights are published", flush=True)
    return wrong, reported


def rows(path: Path, profile: profiles.Profile) -> list[tuple[str, str, int, dict[str, float]]]:
    """Role, network, seed and figures of each network in ``results.json``.

    A name in a file chooses no code: networks are kdlib's, or those that the user typed.
    """
    found = []
    for run in evaluate.load_results(path)["runs"]:
        role, network = run["role"], run["network"]
        if network not in (*NETWORKS, profile.teacher, *profile.students):
            raise Failed(
                f"{path} names the network {network!r}, which is not one of kdlib's; if it is yours, name it: "
                f'--params "student={network}" (or teacher=)'
            )
        if role not in evaluate.ROLES or not all(isinstance(seed, int) for seed in run["seeds"]):
            raise Failed(f"{path}: role {role!r}, seeds {run['seeds']}: expected one of {evaluate.ROLES}, and numbers")
        for place, seed in enumerate(run["seeds"]):
            found.append((role, network, seed, {name: run[name][place] for name in ("accuracy", "nll", "ece")}))
    return found


def compared(name: str, scores: evaluate.Scores, figures: dict[str, float]) -> list[str]:
    """In words, which of a network's figures are not those that were reported."""
    print(f"{name}: accuracy {scores.accuracy:.2%}, results.json {figures['accuracy']:.2%}", flush=True)
    again = {measure: getattr(scores, measure) for measure in figures}
    return [
        f"{name}: {measure} is {again[measure]:.4f}, results.json says {reported:.4f}"
        for measure, reported in figures.items()
        if not abs(reported - again[measure]) <= TOLERANCE
    ]


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    choices(parser, "profile", "params")
    parser.add_argument("--published", action="store_true", help="what book/published holds, not a run of yours")
    return exit_status(verify, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
