"""Sweeps: chapters run with every combination of some parameters, side by side; and what was run, listed and compared.

    python tools/book.py sweep --chapters 05 --grid "temperature=1,2,4,8 alpha=0.1,0.5 seed=0,1,2"

Each run has a folder below runs/ with its executed notebooks and ``run.json``: its parameters, how it ended, and what
came out. A run that is done, and whose notebooks and kdlib are as they were, is not repeated.
"""

from __future__ import annotations

import concurrent.futures
import csv
import datetime
import io
import itertools
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import trees
from notebooks import RUNS, Chapter, Refused
from stale import code_cells

from kdlib import evaluate, profiles
from kdlib.models import network_name
from kdlib.records import artefacts
from kdlib.records.documents import NUMBER, mismatch
from kdlib.records.limits import read_json

RECORD, LOG = "run.json", "run.log"
FIELDS = {"profile": str, "chapters": [str], "parameters": dict, "outcome": str, "date": str, "seconds": NUMBER}
FIELDS |= {"made_from": str, "results": {...: {...: NUMBER}}}  # of a record

# --- records of runs -----------------------------------------------------------------------------------------------


def record(settings: profiles.Profile, given: Mapping[Chapter, dict], outcome: str, seconds: float) -> dict:
    """Write and return what is known of a run: ``runs/<folder>/run.json``."""
    values = {name: value for parameters in given.values() for name, value in parameters.items() if name != "run"}
    known = {
        "profile": settings.name,
        "chapters": [chapter.number for chapter in given],
        "parameters": values,
        "outcome": outcome,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "made_from": made_from(list(given)),
        "results": results(settings) if outcome == "done" else {},
    }
    path = RUNS / settings.folder.name / RECORD
    with artefacts.atomic_write(path) as partial:
        partial.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    return known


def made_from(selected: Sequence[Chapter]) -> str:
    """Hash of the code that a run of those chapters executes: their cells, and the modules of kdlib that they use."""
    cells = {chapter.number: code_cells(chapter) for chapter in selected}
    return artefacts.digest({n: [trees.cells_digest(own), trees.used_modules(own)] for n, own in cells.items()})


def results(settings: profiles.Profile) -> dict[str, dict[str, float]]:
    """What a run's students reach, by their seeds: on the validation images, and in the table of chapter 06.

    By network: the accuracy of the student alone and of the distilled one, and the difference of those two.
    """
    found: dict[str, dict] = {}
    several = len(settings.students) > 1
    for network in settings.students:
        own = f"{network_name(network)}: " if several else ""
        reached = {role: _accuracies(settings, role, network) for role in ("student", "distilled")}
        for role, name in (("student", "alone"), ("distilled", "distilled")):
            if reached[role]:
                found[own + name] = reached[role]
        both = sorted(set(reached["student"]) & set(reached["distilled"]))
        if both:
            found[f"{own}gain"] = {s: reached["distilled"][s] - reached["student"][s] for s in both}
    table = settings.folder / "results.json"
    if table.exists():
        for run in evaluate.load_results(table)["runs"]:
            if run["role"] == "distilled":
                own = f"{run['network']}: " if several else ""
                found[f"{own}test accuracy"] = dict(zip(map(str, run["seeds"]), run["accuracy"], strict=True))
    return found


def _accuracies(settings: profiles.Profile, role: str, network: object) -> dict[str, float]:
    """By seed, the validation accuracy at the end of a student's training, from the record beside its weights."""
    found = {}
    for seed in settings.seeds:
        file = settings.file(role, network, seed)
        # in the folder of the profile without overrides lies what several runs share
        for folder in (settings.folder, artefacts.base_folder(settings.folder)):
            history = artefacts.record(folder / file).get("history") or {}
            if history.get("accuracy"):
                found[str(seed)] = history["accuracy"][-1]
                break
    return found


def recorded() -> dict[str, dict]:
    """All runs that left a record, by the name of their folder, the latest last."""
    found = {}
    for path in RUNS.glob(f"*/{RECORD}"):
        try:
            known = read_json(path)
            if wrong := mismatch(known, FIELDS):
                raise ValueError(wrong)
            found[path.parent.name] = {name: known[name] for name in FIELDS}
        except (OSError, ValueError) as error:
            print(f"{path} is not a record of a run ({error}), and is skipped", file=sys.stderr)
    return dict(sorted(found.items(), key=lambda item: item[1]["date"]))


# --- sweeping ------------------------------------------------------------------------------------------------------


def read_grid(text: str) -> list[dict[str, str]]:
    """Every combination of ``temperature=1,2 alpha=0.1,0.5``, as texts; Refused if it is no grid."""
    axes: dict[str, list[str]] = {}
    for item in shlex.split(text):
        name, equals, values = item.partition("=")
        listed = [value for value in values.split(",") if value]
        if not equals or not name or not listed or len(set(listed)) < len(listed):
            raise Refused(f"grid {item!r}: expected name=value,value with different values, such as temperature=1,2,4")
        if name in axes:
            raise Refused(f"grid has {name} twice: expected each name once, with all its values")
        axes[name] = listed
    if not axes:
        raise Refused('no grid: expected one such as --grid "temperature=1,2,4 seed=0,1" (make: GRID="…")')
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def sweep(settings: Mapping[str, profiles.Profile], selected: list[Chapter], profile: str) -> dict[str, dict]:
    """Run the chapters for each of the settings, as many side by side as there are processors or GPUs.

    Args:
        settings: by the parameters as a text, ``temperature=4 seed=0``.

    Returns:
        By the same text, the record of the run; of one that failed, its outcome says why.
    """
    code, done, waiting = made_from(selected), {}, []
    numbers = [chapter.number for chapter in selected]

    def done_before(text: str, records: Mapping[str, dict]) -> dict | None:
        """The record of that run, if there is one that need not be repeated."""
        known = records.get(settings[text].folder.name, {})
        fresh = (known.get("outcome"), known.get("made_from"), known.get("chapters")) == ("done", code, numbers)
        return known if fresh else None

    before = recorded()
    for text in settings:
        if known := done_before(text, before):
            done[text] = known
        else:
            waiting.append(text)
    gpus = torch.cuda.device_count()
    workers = min(max(1, gpus or os.cpu_count() or 1), max(1, len(waiting)))
    print(f"{len(settings)} runs: {len(done)} done before, {len(waiting)} to do, {workers} at a time", flush=True)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        free = list(range(workers))  # numbers of GPUs, or of places on the processor

        def go(text: str) -> dict:
            place = free.pop()
            try:
                with artefacts.lock(
                    RUNS / settings[text].folder.name / LOG
                ):  # another sweep may be making the same run
                    made = done_before(text, recorded())
                    return made or _in_a_process(text, settings[text], numbers, profile, place if gpus else None)
            finally:
                free.append(place)

        running = {pool.submit(go, text): text for text in waiting}
        try:
            for count, finished in enumerate(concurrent.futures.as_completed(running), len(done) + 1):
                text = running[finished]
                done[text] = finished.result()
                print(f"{count} of {len(settings)}: {text}: {in_words(done[text])}", flush=True)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    return {text: done[text] for text in settings}


def _in_a_process(text: str, settings, numbers: list[str], profile: str, gpu: int | None) -> dict:
    """One run of the sweep; what it prints is kept beside its notebooks."""
    folder, start = RUNS / settings.folder.name, time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).unlink(missing_ok=True)  # what an earlier attempt came to is not this one's
    environment = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)})
    environment.setdefault("OMP_NUM_THREADS", "1")  # the processors are shared by the runs
    command = [sys.executable, str(Path(__file__).with_name("book.py")), "run", "--profile", profile]
    command += ["--chapters", " ".join(numbers), "--params", text]
    with open(folder / LOG, "w", encoding="utf-8") as log:
        status = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
    known = recorded().get(settings.folder.name)
    if known and known["outcome"] != "done":
        return known
    if status or known is None:
        lines = (folder / LOG).read_text(encoding="utf-8").strip().splitlines() or ["nothing was printed"]
        return {"outcome": f"failed: {lines[-1]}", "seconds": time.perf_counter() - start, "results": {}}
    return known


def in_words(known: Mapping) -> str:
    """How a run ended, in a few words."""
    if known["outcome"] != "done":
        return known["outcome"].partition("\n")[0]
    means = {name: float(np.mean(list(by_seed.values()))) for name, by_seed in known["results"].items()}
    parts = [
        f"{name} {100 * mean:+.2f} points" if name.endswith("gain") else f"{name} {mean:.2%}"
        for name, mean in means.items()
    ]
    return f"{', '.join(parts) or 'no students were trained'} ({known['seconds']:.0f} s)"


def parameters_of(known: Mapping) -> str:
    """A run's parameters as they were given."""
    return " ".join(f"{name}={value}" for name, value in known["parameters"].items()) or "–"


def side_by_side(pair: Sequence[Mapping]) -> list[list[str]]:
    """Two runs as rows of a table: first what differs in how they were run, then what came out."""
    rows = [[name, *(str(known.get(name)) for known in pair)] for name in ("profile", "date", "outcome", "seconds")]
    rows.insert(1, ["chapters", *(" ".join(known["chapters"]) for known in pair)])
    for name in dict.fromkeys(name for known in pair for name in known["parameters"]):
        rows.append([name, *(str(known["parameters"].get(name, "–")) for known in pair)])
    same = "the same" if pair[0]["made_from"] == pair[1]["made_from"] else "another"
    rows.append(["code of chapters and kdlib", "", same])
    for name in dict.fromkeys(name for known in pair for name in known["results"]):
        rows.append([name, *(_mean_and_std(over_seeds([known], name), name) for known in pair)])
    return rows


# --- tables --------------------------------------------------------------------------------------------------------


def table_of(runs: Mapping[str, Mapping], grid: Sequence[Mapping[str, str]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one row for each combination of the parameters but the seed; mean and deviation over seeds.

    A seed that several runs have trained counts once: seed=0 and seed=1 share all their students but one each.
    """
    names = [name for name in grid[0] if name != "seed"]
    groups: dict[tuple, list[Mapping]] = {}
    for values, known in zip(grid, runs.values(), strict=True):
        groups.setdefault(tuple(values[name] for name in names), []).append(known)
    measures = list(dict.fromkeys(name for known in runs.values() for name in known["results"]))
    rows = []
    for values, known in groups.items():
        finished = [one for one in known if one["outcome"] == "done"]
        row = [*values, f"{len(finished)} of {len(known)}"]
        rows.append([*row, *(_mean_and_std(over_seeds(finished, measure), measure) for measure in measures)])
    return [*names, "runs", *measures], rows


def over_seeds(runs: Sequence[Mapping], measure: str) -> list[float]:
    """A measure for each seed that any of those runs has."""
    return list({seed: value for one in runs for seed, value in one["results"].get(measure, {}).items()}.values())


def _mean_and_std(values: Sequence[float], measure: str) -> str:
    if not values:
        return "–"
    percent = 100 * np.array(values)
    mean = f"{percent.mean():+.2f}" if measure.endswith("gain") else f"{percent.mean():.2f} %"
    return mean if len(values) == 1 else f"{mean} ± {percent.std(ddof=1):.2f}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def save(folder: Path, runs: Mapping[str, Mapping], grid: Sequence[Mapping[str, str]], folders: Sequence[Path]) -> None:
    """The table as Markdown, every run as a line of CSV, and a picture, in `folder`."""
    header, rows = table_of(runs, grid)
    with artefacts.atomic_write(folder / "sweep.md") as table:
        table.write_text(markdown(header, rows), encoding="utf-8")
    measures = list(dict.fromkeys(name for known in runs.values() for name in known["results"]))
    lines = io.StringIO()
    writer = csv.writer(lines)
    writer.writerow([*grid[0], *measures, "outcome", "seconds", "folder"])
    for values, known, where in zip(grid, runs.values(), folders, strict=True):
        reached = [over_seeds([known], name) for name in measures]
        measured = [round(float(np.mean(own)), 6) if own else "" for own in reached]
        outcome = known["outcome"].partition("\n")[0]
        writer.writerow([*values.values(), *measured, outcome, f"{known['seconds']:.1f}", where.as_posix()])
    with artefacts.atomic_write(folder / "sweep.csv") as listed:
        listed.write_text(lines.getvalue(), encoding="utf-8")
    picture(folder / "sweep.png", runs, grid)


def picture(path: Path, runs: Mapping[str, Mapping], grid: Sequence[Mapping[str, str]]) -> None:
    """What came out against the first parameter: one curve for each combination of the others that vary."""
    import matplotlib.pyplot as plt

    varied = [name for name in grid[0] if name != "seed" and len({values[name] for values in grid}) > 1]
    first, *others = varied or list(grid[0])[:1]
    measures = [m for m in dict.fromkeys(name for known in runs.values() for name in known["results"])]
    measures = [m for m in measures if m.endswith(("distilled", "gain"))]
    if not measures:
        return
    figure, panels = plt.subplots(1, len(measures), figsize=(5 * len(measures), 3.4), squeeze=False)
    for panel, measure in zip(panels[0], measures, strict=True):
        curves: dict[str, dict[str, list[Mapping]]] = {}
        for values, known in zip(grid, runs.values(), strict=True):
            if measure in known["results"]:
                label = ", ".join(f"{name} {values[name]}" for name in others)
                curves.setdefault(label, {}).setdefault(values[first], []).append(known)
        places = list(dict.fromkeys(values[first] for values in grid))
        for label, curve in curves.items():
            at = [places.index(place) for place in curve]
            reached = [100 * np.array(over_seeds(own, measure)) for own in curve.values()]
            spread = [own.std(ddof=1) if len(own) > 1 else 0 for own in reached]
            panel.errorbar(at, [own.mean() for own in reached], spread, marker="o", capsize=3, label=label)
        panel.set_xticks(range(len(places)), places)
        panel.set_xlabel(first)
        panel.set_ylabel(f"{measure}, points" if measure.endswith("gain") else f"{measure}: validation accuracy, %")
        if others and curves:
            panel.legend()
    figure.tight_layout()
    with artefacts.atomic_write(path) as partial:
        figure.savefig(partial, dpi=150)
    plt.close(figure)
