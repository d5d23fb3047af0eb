"""The page of advice: for each situation what to do, decided by a measurement, or that we do not know.

A line names the comparison that decides it, by the rows of both runs together.
"""

from __future__ import annotations

import dataclasses
from functools import partial

from findings import Finding
from notebooks import BOOK

from kdlib import lab, plots
from kdlib.lab import replication


@dataclasses.dataclass(frozen=True)
class Line:
    """One piece of advice."""

    situation: str
    setting: str  # what the advice is on, such as T
    experiment: str  # whose rows decide it
    asks: lab.Comparison
    advice: str  # if the rows support the comparison
    opposite: str  # if they contradict it


def no_worse(case: str, than: str) -> lab.Comparison:
    """That a case loses less than half a point of accuracy against another."""
    return lab.compare("accuracy", case, than, margin=-0.005)


CONTROLS, LADDER, HEAT = "05_controls", "08_dark_knowledge", "09_temperature_and_alpha"
SIZES, PATIENCE, LESS = "10_teacher_and_student", "11_patient_teacher", "12_less_data"
FEW, ALL = 100, 2000  # images in chapter 12's smallest part, and in all of them
more = partial(lab.compare, "accuracy")
# fmt: off
LINES = (  # situation, setting, experiment, comparison; advice if it is supported; advice if it is contradicted
    Line("You have labels and a teacher", "distil at all?", CONTROLS,
         more("distilled, twice the epochs", "alone, everything"),
         "Distil, and train for as long as you would train the student alone",
         "Train alone, with what a search keeps of smoothing, cutout, mixup and a longer budget"),
    Line("You have labels and no teacher", "label smoothing", LADDER, more("label smoothing", "hard labels"),
         "Smooth the labels; search the strength from 0.05 upwards",
         "Leave label smoothing out"),
    Line("You could smooth labels instead of distilling", "label smoothing", LADDER,
         more("soft labels", "label smoothing"),
         "Distil: soft labels are worth more than smoothed ones",
         "Smooth the labels: that needs no teacher"),
    Line("All images have labels", "alpha", HEAT, more("T = 4, alpha = 0.1", "T = 4, alpha = 0.5"),
         "alpha = 0.1: give the labels little weight",
         "alpha = 0.5: give the labels as much weight as the soft term"),
    Line("Some or all images have no labels", "alpha", HEAT, no_worse("T = 4, alpha = 0", "T = 4, alpha = 0.1"),
         "alpha = 0: less than half a point is lost without the labels",
         "alpha = 0.1: without the labels more than half a point is lost"),
    Line("Large student", "T", HEAT, no_worse("large, T = 8, alpha = 0.1", "large, T = 64, alpha = 0.1"),
         "T = 8 rather than 64, which gains less than half a point",
         "T = 64 rather than 8: it gains more than half a point"),
    Line("Small student", "T", HEAT, more("small, T = 4, alpha = 0.1", "small, T = 64, alpha = 0.1"),
         "T = 4 rather than 64",
         "T = 64 rather than 4"),
    Line("Student of middle size", "T", HEAT, more("T = 4, alpha = 0.1", "T = 1, alpha = 0.1"),
         "T = 4 rather than T = 1",
         "T = 1 rather than T = 4"),
    Line("You write the loss yourself", "factor T²", HEAT,
         more("T = 64, alpha = 0.1", "T = 64, alpha = 0.1, without T²"),
         "Multiply the soft term by T², even if you search the rate",
         "Leave T² out at T = 64"),
    Line("The student alone is tuned", "learning rate", CONTROLS, no_worse("distilled", "distilled, tuned"),
         "Take its rate and weight decay, and T = 4: a search of all three gains less than half a point",
         "Search rate, weight decay and T anew: it gains more than half a point"),
    Line("You can train for longer", "budget", PATIENCE, more("consistent (long)", "consistent (usual)"),
         "Train the distilled student three times as long",
         "Do not train for longer: it costs accuracy"),
    Line("You can run the teacher on every view", "targets", PATIENCE, more("consistent (usual)", "clean (usual)"),
         "Predict for the distorted image that the student sees",
         "One prediction per clean image is better"),
    Line("You have only one prediction per image, and shifts of two pixels", "targets", PATIENCE,
         no_worse("shifts: clean (usual)", "shifts: consistent (usual)"),
         "Use it for all shifted views: less than half a point is lost",
         "Get a prediction for each view that the student sees"),
    Line("You can run the teacher on mixtures of images", "mixup", PATIENCE,
         more("mixtures: consistent (long)", "consistent (long)"),
         "Add mixup with the teacher's predictions for the mixtures",
         "Leave mixup out"),
    Line("You choose between teachers", "teacher's size", SIZES,
         more("100 units by large teacher", "100 units by small teacher"),
         "Take the larger, more accurate one",
         "Take the smaller one"),
    Line("You train the teacher yourself", "its label smoothing", SIZES,
         more("100 units by middle teacher", "100 units by smoothed teacher"),
         "Train the teacher without label smoothing",
         "Train the teacher with label smoothing"),
    Line("You can train several networks of the student's kind", "teacher", SIZES,
         more("100 units by ensemble", "100 units by middle teacher"),
         "Distil from their ensemble rather than from one large teacher",
         "One large teacher is better than their ensemble"),
    Line(f"Few images ({FEW}), and a teacher trained on many", "distil at all?", LESS,
         more(f"teacher of {ALL} labels, {FEW} images", f"labels alone, {FEW} images"),
         "Distil on the few images",
         "Use their labels alone"),
    Line(f"Few labels ({FEW}), and many images without labels", "data", LESS,
         more(f"teacher of {FEW} labels, {ALL} images", f"teacher of {FEW} labels, {FEW} images"),
         "Train a teacher on the labels, and let it predict all images for the student, with alpha = 0",
         "Keep to the images with labels"),
    Line(f"Few images ({FEW}) and nothing else", "distil at all?", LESS,
         more(f"teacher of {FEW} labels, {FEW} images", f"labels alone, {FEW} images"),
         "Train a larger teacher on the same images, and distil it",
         "Use the labels alone, smoothed"),
)
# fmt: on


def shown(found: list[Finding], lines: tuple[Line, ...] = LINES) -> str:
    """The table of advice, in Markdown."""
    by_experiment = {finding.rows["experiment"]: finding for finding in found}
    rows = [row(line, by_experiment.get(line.experiment)) for line in lines]
    answered = sum(row[2].startswith("**") for row in rows)
    table = plots.table(["if", "setting", "advice", "measured"], rows).data
    return f"\n{table}\n\nOf {len(rows)} questions, the measurements answer {answered}. Written by `make publish`.\n\n"


def row(line: Line, finding: Finding | None) -> list[str]:
    if (judgement := judged(line, finding)) is None:
        return [line.situation, line.setting, "not measured yet", link(line.experiment)]
    advice = {
        lab.SUPPORTED: f"**{line.advice}**",
        lab.CONTRADICTED: f"**{line.opposite}**",
        lab.INCONCLUSIVE: "we do not know",
    }[judgement.verdict]
    figure = f"{replication.described(line.asks.weights)}: {judgement.figures[0]}"
    measured = f"{figure}; profile {finding.rows['profile']}, {link(line.experiment)}"
    return [line.situation, line.setting, advice, measured]


def judged(line: Line, finding: Finding | None) -> lab.Judgement | None:
    """What the rows of all runs together say; None if they are not there, or lack a case."""
    if finding is None:
        return None
    try:
        return lab.judge(lab.Claim(line.advice, "", (line.asks,)), lab.pooled(*finding.runs))
    except ValueError:
        return None


def link(experiment: str) -> str:
    page = next(BOOK.glob(f"{experiment[:2]}_*.ipynb"), None)
    return f"[chapter {experiment[:2]}]({page.name})" if page else f"chapter {experiment[:2]}"
