"""What the repository holds for readers without a teacher, and where a chapter's networks come from.

A run of the book leaves records in ``book/published/<profile>/``: soft labels, logits, training histories, the figures
that need live weights, and the students' weights. Beside each file lies its record, which holds the file's SHA-256: a
file that differs is never used. With ``start_from="published"`` the records replace what would be computed.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlib.data import Data, ImageSet
from kdlib.evaluate import file_megabytes, predict_logits
from kdlib.losses import distillation_loss
from kdlib.models import build
from kdlib.profiles import Profile
from kdlib.records import artefacts
from kdlib.records.documents import HISTORY, load_document, read_form, save_document
from kdlib.records.fetch import published_file
from kdlib.soft_labels import SoftLabels, load_or_generate, load_soft_labels
from kdlib.train import History, load_or_train

# the settings that decide what a network or a figure of a run is; n_seeds and students only choose among them
DECISIVE = ("dataset", "limit", "teacher", "teacher_recipe", "student_recipe", "temperature", "alpha", "beta", "views")
FIGURES = "file of figures", "delete it and run its chapters again"  # what measured.json is, and how to mend it


@dataclasses.dataclass
class Network:
    """A trained network, or what was recorded of one."""

    model: nn.Module | None  # in eval mode; None if only records are there
    history: History | None  # None if nothing tells how it was trained
    logits: dict[str, Tensor]  # (N, C) float32 by split: train, validation, test; computed when first asked for
    provenance: dict  # device, date, seconds, versions of its training
    megabytes: float  # size of the file of its weights, 10**6 bytes; nan if that is not recorded
    path: Path | None = None  # the file of its weights; None if it comes from records
    note: str = ""  # in Markdown, what the page started from; empty from scratch
    make_soft_labels: Callable[[], SoftLabels] | None = None  # of a teacher

    @cached_property
    def soft_labels(self) -> SoftLabels:
        """The teacher's soft labels of the training images: loaded or generated when first asked for."""
        if self.make_soft_labels is None:
            raise AttributeError("a student has no soft labels: ask the network that kdlib.load_teacher returned")
        return self.make_soft_labels()


class Logits(dict):
    """The clean images' logits (N, C) float32 by split: recorded ones, and others once they are asked for."""

    def __init__(self, model: nn.Module | None, data: Data, recorded: dict[str, Tensor]):
        super().__init__(recorded)
        self.model, self.data = model, data

    def __missing__(self, split: str) -> Tensor:
        if split not in self.data._fields:
            raise KeyError(f"split is {split!r}: expected one of {', '.join(self.data._fields)}")
        if self.model is None:
            raise KeyError(f"no logits of {split!r} are recorded, only of {', '.join(self)}: use start_from=scratch")
        self[split] = predict_logits(self.model, getattr(self.data, split))
        return self[split]


def load_teacher(settings: Profile, data: Data) -> Network:
    """The teacher: trained, or loaded if it was trained before; with start_from="published", what is recorded of it.

    Records may hold fewer views of soft labels than `settings` asks for: ``soft_labels.views`` tells how many.

    Raises:
        FileNotFoundError: nothing is published at this profile, or it cannot be fetched.
        ValueError: the records are damaged, or of another teacher or other images.
    """
    if settings.start_from == "published":
        return _recorded_teacher(settings, data)
    teacher = _load_or_train(settings, data, "teacher", settings.teacher, F.cross_entropy, settings.teacher_recipe)
    views = data.train.resolve_views(settings.views)
    teacher.make_soft_labels = partial(load_or_generate, settings.folder, teacher.model, data.train, views)
    return teacher


def load_student(settings: Profile, data: Data, teacher: Network, role: str, network: str, seed: int) -> Network:
    """A student: trained, or loaded if it was trained before.

    With start_from="published" it is what is recorded of it if the settings are those of the recorded run; otherwise it
    is trained in as many views as the recorded soft labels hold.

    Args:
        role: ``student`` (trained on the labels alone) or ``distilled``.
        network: one of ``settings.students``.
        seed: one of ``settings.seeds``.
    """
    recipe, note = dataclasses.replace(settings.student_recipe, seed=seed), ""
    if settings.start_from == "published":
        if student := _recorded_student(settings, data, role, network, seed):
            return student
        views = min(data.train.resolve_views(recipe.views), teacher.soft_labels.views)
        recipe = dataclasses.replace(recipe, views=views)  # both roles alike, so that they see the same images
        note = (
            f"The students are trained here, in {views} view{'s' if views > 1 else ''} of each image: no logits of "
            f"theirs are recorded with these settings (`make publish PROFILE={settings.name}` records the profile's)."
        )
    loss_fn, targets = F.cross_entropy, None
    if role == "distilled":
        weights = {"temperature": settings.temperature, "alpha": settings.alpha, "beta": settings.beta}
        loss_fn, targets = partial(distillation_loss, **weights), teacher.soft_labels
    student = _load_or_train(settings, data, role, network, loss_fn, recipe, targets)
    student.note = note
    return student


def _load_or_train(settings, data, role, network, loss_fn, recipe, targets=None) -> Network:
    made = {"targets": targets, "validation": data.validation}
    file = settings.file(role, network, recipe.seed)
    trained = load_or_train(settings.folder, file, network, data.train, loss_fn, recipe, **made)
    made, size = artefacts.record(trained.path).get("provenance", {}), file_megabytes(trained.path)
    return Network(trained.model, trained.history, Logits(trained.model, data, {}), made, size, trained.path)


def measured(settings: Profile, name: str, compute: Callable[[], object]) -> object:
    """A figure that needs live weights: computed, and kept for publishing in ``<folder>/measured.json``.

    Args:
        name: of the figure; one per profile.
        compute: returns a JSON-able value. With start_from="published" it is not called.

    Returns:
        The value as JSON has it: tuples are lists, keys are strings. With start_from="published" it is None if none was
        recorded with these settings, and a printed line says so.
    """
    if settings.start_from == "published":
        path = _optional(settings, "measured.json")
        made_from = artefacts.record(path)["fingerprint"] if path else {}
        if made_from.get("settings") != described(settings) or made_from.get("n_seeds") not in (None, settings.n_seeds):
            path = None
        values = load_document(path, *FIGURES) if path else {}
        if name not in values:
            print(
                f"{name}: not recorded at profile {settings.name} with these settings; it needs the networks "
                f"themselves (start_from=scratch; `make publish PROFILE={settings.name}` records it)"
            )
        return values.get(name)
    path, value = settings.folder / "measured.json", json.loads(json.dumps(compute()))
    with artefacts.lock(path):
        values = load_document(path, *FIGURES) if path.exists() else {}
        save_document(path, values | {name: value})
    return value


# --- from records --------------------------------------------------------------------------------------------------


def described(settings: Profile) -> dict:
    """The settings that decide what a run's networks and figures are, as JSON has them."""
    of_settings = dataclasses.asdict(settings)
    decisive = {name: of_settings[name] for name in DECISIVE}
    decisive |= {name: of_settings[name] for name in ("size", "padding", "flip") if of_settings[name] is not None}
    return json.loads(json.dumps(decisive, default=str))  # a network of the reader's own may be a function


def load_published(settings: Profile, data: Data) -> tuple[SoftLabels, dict[str, Tensor]]:
    """The recorded soft labels of a profile's teacher, and its logits (N, C) float32 for every split's clean images.

    The soft labels have as many views as were published; all logits were rounded to half precision.

    Raises:
        FileNotFoundError: nothing is published at this profile, or it cannot be fetched.
        ValueError: a damaged file, or logits of other images than those of `data`, or of another teacher.
    """
    path = _file(settings, "soft_labels.npy")
    made_from = artefacts.record(path)["fingerprint"]
    _check_images(settings, made_from["data"], data.train)
    soft_labels, recorded = load_soft_labels(path, data.train), recorded_logits(settings, data, made_from["teacher"])
    file = settings.file("teacher")
    if file not in recorded:
        raise ValueError(
            f"teacher is {settings.teacher!r}: the published records are of {next(iter(recorded))}; leave the teacher "
            "as the profile sets it, or use start_from=scratch"
        )
    return soft_labels, {"train": soft_labels.logits[0].float(), **recorded[file]}


def recorded_logits(settings: Profile, data: Data, teacher: object = None) -> dict[str, dict[str, Tensor]]:
    """The recorded logits (N, C) float32 of ``validation`` and ``test`` by the name of the network's weights.

    Args:
        teacher: what tells the teacher of the soft labels; ValueError if these logits are of another.
    """
    path = _optional(settings, "logits.npy") or _file(settings, "teacher_logits.npy")  # the older of the teacher alone
    made_from = artefacts.record(path)["fingerprint"]
    files = list(made_from.get("networks", {}))
    files = files or [name for name in _known(settings)["fingerprint"] if name.startswith("teacher_")]
    for split in ("validation", "test"):
        _check_images(settings, made_from[split], getattr(data, split))
    array = torch.from_numpy(artefacts.load_array(path))
    array = array if array.ndim == 3 else array[None]
    sizes = [len(data.validation), len(data.test)]
    expected = (len(files), sum(sizes), data.train.classes)
    if array.shape != expected or teacher not in (None, made_from["teacher"]):
        raise ValueError(
            f"{path.name} {tuple(array.shape)} does not belong to soft_labels.npy: expected the same teacher's logits "
            f"{expected}; publish both again (`make publish PROFILE={settings.name}`)"
        )
    splits = (network.float().split(sizes) for network in array)
    return {file: dict(zip(("validation", "test"), own, strict=True)) for file, own in zip(files, splits, strict=True)}


def _recorded_teacher(settings: Profile, data: Data) -> Network:
    soft_labels, logits = load_published(settings, data)
    teacher = _recorded(settings, data, settings.file("teacher"), settings.teacher, logits)
    teacher.make_soft_labels = lambda: soft_labels
    teacher.note = (
        f"**Composed from published records.** The teacher's logits on this page are the recorded ones of profile "
        f"{settings.name}: {soft_labels.views} view{'s' if soft_labels.views > 1 else ''} of each training image, and "
        f"the clean validation and test images. {_measured_on(teacher.provenance)}"
    )
    recorded, wanted = _known(settings).get("settings", {}).get("teacher_recipe"), described(settings)["teacher_recipe"]
    if recorded not in (None, wanted):
        other = ", ".join(f"{name} {value}" for name, value in recorded.items() if value != wanted[name])
        teacher.note += f" It was trained with {other}, whatever this run's parameters say."
    return teacher


def _recorded_student(settings: Profile, data: Data, role: str, network: str, seed: int) -> Network | None:
    """What is recorded of a student; None with other settings, or if not all that it is compared with is recorded.

    The recorded ones may have seen more views than those that are trained here: the two do not mix.
    """
    logits = recorded_logits(settings, data) if _as_recorded(settings) else {}
    wanted = {settings.file(r, network, s) for r in ("student", "distilled") for s in settings.seeds}
    file = settings.file(role, network, seed)
    if not wanted | {file} <= logits.keys():
        return None
    student = _recorded(settings, data, file, network, logits[file])
    student.note = f"The students' logits are recorded ones, too. {_measured_on(student.provenance)}"
    return student


def _recorded(settings: Profile, data: Data, file: str, network: str, logits: dict[str, Tensor]) -> Network:
    """What is recorded of the network whose weights are named `file`; with the weights if they are published."""
    known, histories = _known(settings), _file(settings, "histories.json")
    about, model = known.get("networks", {}).get(file, {}), None
    if about.get("weights"):  # in half precision
        model = build(network, data.train.classes, data.train.channels)
        model = artefacts.load_weights(_file(settings, file), model).eval()
    histories = read_form(histories, {file: HISTORY}, "restore it, or use start_from=scratch")
    history = History(**{name: histories[file][name] for name in HISTORY})
    made, size = about.get("provenance", known["provenance"]), about.get("megabytes", math.nan)
    return Network(model, history, Logits(model, data, logits), made, size)


def _measured_on(made: dict) -> str:
    commit = f"at commit {made['commit']}" if made.get("commit") else "at a commit that was not recorded"
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    return f"They were measured on {made['device']}, {made['date']}, {commit}; this page was composed on {today}."


def _known(settings: Profile) -> dict:
    """The record of the histories: of each network fingerprint and provenance, and the settings of the run."""
    return artefacts.record(_file(settings, "histories.json"))


def _as_recorded(settings: Profile) -> bool:
    return _known(settings).get("settings") == described(settings)


def _check_images(settings: Profile, made_for: str, images: ImageSet) -> None:
    if made_for != images.identity:
        reason = f"limit is {settings.limit}; leave it out" if settings.limit else "the data set is another one"
        raise ValueError(
            f"the published logits are of {made_for}, the images here are {images.identity}, expected the same: "
            f"{reason}, or run the earlier chapters instead (start_from=scratch)"
        )


def _file(settings: Profile, name: str) -> Path:
    return published_file(settings.name, name, artefacts.base_folder(settings.folder))


def _optional(settings: Profile, name: str) -> Path | None:
    try:
        return _file(settings, name)
    except FileNotFoundError:
        return None
