"""The named bundles of data set, networks and recipes, and how parameters override what they set."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from kdlib.losses import check_weights
from kdlib.models import find_network, network_name
from kdlib.records import artefacts
from kdlib.records.artefacts import did_you_mean
from kdlib.records.fetch import clone_folder
from kdlib.sources.known import DATA_SETS
from kdlib.sources.pictures import LARGEST
from kdlib.sources.splits import Part
from kdlib.train import Recipe


@dataclass(frozen=True)
class Profile:
    """What a run of the book trains, on what, and where it leaves it."""

    name: str
    dataset: str  # a name that kdlib.load_data knows, or the path of the reader's own
    teacher: str | Callable  # network, as kdlib.build takes it
    students: tuple[str | Callable, ...]  # networks; the first is the book's main one
    teacher_recipe: Recipe
    student_recipe: Recipe  # of the student alone and of the distilled one alike; tuned for the former
    temperature: float  # T of the soft targets
    alpha: float  # weight of the cross-entropy with the labels
    views: int | None  # of each image in the soft labels; None: all there are
    n_seeds: int  # students trained with the seeds seed, seed + 1, ...
    beta: float | None = None  # weight of the soft term; None: 1 - alpha
    seed: int = 0
    limit: int | Part | None = None  # images in each split at most, or a part of the training images
    size: int | None = None  # of the images, which are resized and cropped to it; None: as they are
    padding: int | None = None  # pixels by which a view may be shifted; None: as kdlib.load_data sets it
    flip: bool | None = None  # whether a view may be mirrored; None: likewise
    threads: int | None = None  # CPU threads for PyTorch; None: as many as it takes by itself
    start_from: str = "scratch"  # or "published": from the teacher's published logits, without the teacher
    n_search: int = 2  # seeds of part two's searches
    own_teachers: bool = False  # whether in part two each seed has a teacher of its own
    run: str | None = None  # set if parameters override the profile: then part of the folder's name

    @property
    def base(self) -> str:
        """The profile's name, of a second run that of the first: ``laptop`` for ``laptop-repeat``."""
        return self.name.removesuffix("-repeat")

    @property
    def images(self) -> dict[str, object]:
        """How the images are read: keywords of :func:`kdlib.load_data`."""
        return {name: getattr(self, name) for name in ("limit", "size", "padding", "flip")}

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(range(self.seed, self.seed + self.n_seeds))

    @property
    def search_seeds(self) -> tuple[int, ...]:
        """Seeds to choose with, never reported: so many that a second search would choose much the same."""
        return tuple(range(self.seed + 1000, self.seed + 1000 + self.n_search))

    def limit_of(self, images: int) -> int | Part | None:
        """The profile's limit, with so many training images if it is a part of them."""
        return self.limit._replace(images=images) if isinstance(self.limit, Part) else self.limit

    @property
    def folder(self) -> Path:
        """Where artefacts go: ``<outputs>/<profile>``, or ``<outputs>/<profile>-<run>`` with overrides."""
        name = self.name.replace("-", "_")  # what follows a hyphen tells a run with overrides
        return outputs_folder() / (f"{name}-{self.run}" if self.run else name)

    def with_views(self, views: int) -> Profile:
        """The same with so many views of each image, in the soft labels and for the students."""
        return replace(self, views=views, student_recipe=replace(self.student_recipe, views=views))

    def file(self, role: str, network: str | Callable | None = None, seed: int | None = None) -> str:
        """The name of a network's weights: ``teacher_resnet50.pth``, ``student_cnn.pth`` for the distilled student of
        the first seed, ``student_cnn_alone_seed1.pth`` for the student trained on the labels alone with seed 1."""
        of_seed = "" if seed in (None, self.seed) else f"_seed{seed}"
        if role == "teacher":
            return f"teacher_{network_name(network or self.teacher)}{of_seed}.pth"
        alone = {"distilled": "", "student": "_alone"}[role]
        return f"student_{network_name(network)}{alone}{of_seed}.pth"


PROFILES = {
    "quick": Profile(
        name="quick",
        dataset="digits",
        teacher="digits_cnn",
        students=("perceptron",),
        # chosen on validation too: unlike the student, the teacher is better without shifted images, and the student
        # learns as much from it as from one trained on them
        teacher_recipe=Recipe(epochs=200, batch_size=20, learning_rate=0.1, weight_decay=5e-3, views=1),
        # chosen for the student alone, on validation, over learning rate, weight decay and views: one view, half or
        # twice the rate, half or twice the decay do no better
        student_recipe=Recipe(epochs=200, batch_size=20, learning_rate=0.08, weight_decay=1e-3),
        temperature=4.0,
        alpha=0.1,
        views=None,
        n_seeds=5,
        threads=1,  # networks this small are done before a second thread has started, and it can hold up the first
    ),
    "laptop": Profile(
        name="laptop",
        dataset="mnist",
        limit=Part(2_000),  # so few that the student alone is a point or two below its teacher
        teacher="lenet",
        students=("mlp100",),
        teacher_recipe=Recipe(epochs=20, batch_size=50, learning_rate=0.05),
        # chosen for the student alone, on validation, over learning rate and weight decay
        student_recipe=Recipe(epochs=50, batch_size=100, learning_rate=0.05, weight_decay=2e-3),
        temperature=4.0,
        alpha=0.1,
        views=None,
        n_seeds=8,
        # of two seeds' means the standard error of a difference was 0.18 points, as much as is chosen by
        n_search=4,
        own_teachers=True,
    ),
    "full": Profile(
        name="full",
        dataset="cifar10",
        teacher="resnet50",
        students=("cnn", "wide_resnet14"),
        teacher_recipe=Recipe(epochs=100, batch_size=512, learning_rate=0.4, cutout=16, mixup=0.2),
        student_recipe=Recipe(epochs=100, batch_size=512, learning_rate=0.4),
        temperature=4.0,
        alpha=0.1,
        views=None,
        n_seeds=3,
    ),
}

# the same once more with other seeds, other teachers and other training images: does a finding come out again?
PROFILES["laptop-repeat"] = replace(PROFILES["laptop"], name="laptop-repeat", limit=Part(2_000, block=1), seed=100)

PARAMETERS = (
    "dataset", "teacher", "student", "limit", "size", "padding", "flip", "epochs", "views", "temperature", "alpha",
    "beta", "n_seeds", "seed", "start_from",
)  # fmt: skip
# least and most; of the seeds there are 2**32, and those of a search come 1,000 after the first
RANGES = {"limit": (1, 10**9), "n_seeds": (1, 1_000), "seed": (0, 2**32 - 2_001)}
RANGES |= {"size": (2, LARGEST), "padding": (0, LARGEST // 4)}
START_FROM = ("scratch", "published")


def resolve(name: str = "auto", *, run: str | None = None, **overrides) -> Profile:
    """A profile with what the parameters override; those that are None leave it as it is.

    If the profile sets a number of CPU threads, PyTorch is told so, for the whole process.

    Args:
        name: ``quick``, ``laptop``, ``laptop-repeat``, ``full``, or ``auto``: ``$KDLIB_PROFILE`` if it is set,
            otherwise ``full`` with CUDA and ``quick`` without.
        run: names the folder of a run with overrides, ``<profile>-<run>``; None: a hash of the overrides.
        overrides: `dataset` (as :func:`kdlib.load_data` takes it), `teacher` and `student` (networks, as
            :func:`kdlib.build` takes them; the student replaces all of the profile's), `limit` (images in each split),
            `size`, `padding` and `flip` (of the images, see :func:`kdlib.load_data`), `epochs` (of teacher and
            students), `views` (of the soft labels, and so of the students), `temperature`, `alpha`, `beta`, `n_seeds`,
            `seed` (the first of the students', and the teacher's), `start_from` ("published": recorded logits stand in
            for the teacher; "scratch", as None, overrides nothing).

    Raises:
        ValueError: an unknown profile, network or start, or a value out of range.
        TypeError: an unknown parameter.
    """
    if name == "auto":
        name = os.environ.get("KDLIB_PROFILE") or "auto"
    if name == "auto":
        name = "full" if torch.cuda.is_available() else "quick"
    if name not in PROFILES:
        raise ValueError(
            f"profile {name!r} is unknown: expected auto, {', '.join(PROFILES)}{did_you_mean(name, PROFILES)}"
        )
    for key in overrides:
        _check_known(key, PARAMETERS)
    if run and not re.fullmatch(r"\w[\w.+=-]{0,99}", str(run)):  # a path would leave the folder of artefacts
        raise ValueError(f"run is {run!r}: expected a name of letters, digits, hyphens, dots and underscores")
    if overrides.get("start_from") == "scratch":
        overrides["start_from"] = None
    overrides = {key: value for key, value in overrides.items() if value is not None}
    for key in ("temperature", "alpha", "beta"):
        if isinstance(overrides.get(key), bool):
            raise ValueError(f"{key} is {overrides[key]}: expected a finite number")
        if isinstance(overrides.get(key), int):  # papermill makes 4 of "4", and 4.0 is the same
            overrides[key] = float(overrides[key])
    profile, effective = PROFILES[name], {}
    for key, value in overrides.items():
        value = value.item() if isinstance(value, np.generic) else value  # a number of NumPy's as one of Python's
        changed = _override(profile, key, value)
        if changed != profile:  # a value that the profile has anyway needs no folder of its own
            value = network_name(value) if callable(value) else value  # its str() has an address in memory
            effective[key] = value if isinstance(value, (str, int, float)) else str(value)
        profile = changed
    check_weights(profile.temperature, profile.alpha, profile.beta)
    if profile.threads:
        torch.set_num_threads(profile.threads)
    return replace(
        profile,
        teacher_recipe=replace(profile.teacher_recipe, seed=profile.seed),
        student_recipe=replace(profile.student_recipe, seed=profile.seed),
        run=(str(run) if run else artefacts.digest(effective)) if effective or run else None,
    )


def notebook_settings(variables: Mapping[str, object]) -> Profile:
    """The profile that a notebook's parameters ask for; call it with ``globals()``, before other variables are set.

    A notebook's parameters are the annotated variables of its parameters cell. papermill sets others than their
    defaults, and any name at all: one that the notebook does not have would change nothing, and so is an error here.

    Raises:
        TypeError: a variable that is no parameter of the notebook.
        ValueError: as for :func:`resolve`.
    """
    annotations = variables.get("__annotations__")
    if annotations is None:  # from Python 3.14 on they are computed when the module is asked for them
        annotations = getattr(sys.modules.get(variables.get("__name__")), "__annotations__", {})
    declared = [name for name in annotations if name in ("profile", "run", *PARAMETERS)]
    if "settings" not in variables:  # run again in the same notebook, there are the notebook's own variables too
        for name, value in variables.items():
            plain = value is None or isinstance(value, (str, int, float, bool, list, dict, np.generic))
            if plain and not name.startswith("_") and name not in declared and name not in ("In", "Out"):
                _check_known(name, declared)
    values = {name: variables[name] for name in declared}
    for name, value in values.items():
        if not (value is None or callable(value) or isinstance(value, (str, int, float, np.generic, os.PathLike))):
            raise TypeError(
                f"parameter {name} is a {type(value).__name__}: expected a plain value; run the parameters cell again"
            )
    return resolve(values.pop("profile", "auto"), run=values.pop("run", None), **values)


def _check_known(name: str, known: tuple[str, ...] | list[str]) -> None:
    if name not in known:
        raise TypeError(f"parameter {name!r} is unknown: expected one of {', '.join(known)}{did_you_mean(name, known)}")


def _override(profile: Profile, key: str, value) -> Profile:
    """The profile with one parameter changed."""
    if key in RANGES:
        least, most = RANGES[key]
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise ValueError(f"{key} is {value!r}: expected a whole number from {least:,} to {most:,}")
        return replace(profile, **{key: value})
    if key == "epochs":
        teacher, student = (replace(own, epochs=value) for own in (profile.teacher_recipe, profile.student_recipe))
        return replace(profile, teacher_recipe=teacher, student_recipe=student)
    if key == "views":
        return profile.with_views(value)
    if key in ("teacher", "student"):
        find_network(value)  # raises if there is none
        return replace(profile, **({"teacher": value} if key == "teacher" else {"students": (value,)}))
    if key == "dataset":
        known = isinstance(value, os.PathLike) and str(value) in DATA_SETS  # a path is a path, whatever its name
        return replace(profile, dataset=f".{os.sep}{value}" if known else str(value))
    if key == "flip" and value not in (0, 1):
        raise ValueError(f"flip is {value!r}: expected True or False")
    if key == "start_from" and value not in START_FROM:
        raise ValueError(
            f"start_from is {value!r}: expected one of {', '.join(START_FROM)}{did_you_mean(value, START_FROM)}"
        )
    return replace(profile, **{key: value})  # temperature, alpha, beta, start_from


def outputs_folder() -> Path:
    """``$KDLIB_OUTPUTS``; otherwise ``outputs`` in the clone that kdlib is used from, or in the working folder."""
    if os.environ.get("KDLIB_OUTPUTS"):
        return Path(os.environ["KDLIB_OUTPUTS"]).expanduser()
    return (clone_folder() or Path.cwd()) / "outputs"
