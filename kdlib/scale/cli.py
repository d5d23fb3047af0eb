"""``python -m kdlib train``: what chapters 02, 03 and 05 train, without a notebook; under ``torchrun``, on many GPUs.

    python -m kdlib train --role distilled --profile quick
    torchrun --nproc-per-node 2 -m kdlib train --role distilled --profile quick
    torchrun --nproc-per-node 8 -m kdlib train --role distilled --recipe imagenet --data /data/imagenet

Both leave the files that the chapters leave, in the same folder, and a chapter that is run afterwards finds them there.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import warnings
from pathlib import Path

from kdlib import gpu
from kdlib.data import Data
from kdlib.datasets import load_data
from kdlib.evaluate import ROLES
from kdlib.gpu import ranks
from kdlib.profiles import PARAMETERS, Profile, outputs_folder, resolve
from kdlib.published import Network, load_student, load_teacher
from kdlib.records.artefacts import did_you_mean, digest, record
from kdlib.scale.recipes import RECIPES, distil
from kdlib.train import Recipe

OF_THE_PROFILE = tuple(name for name in PARAMETERS if name != "start_from")  # what is published needs no training
OF_A_RECIPE = ("student", "soft_views", "weights", "miniature")  # options of a scale recipe
OF_THE_RECIPE = tuple(field.name for field in dataclasses.fields(Recipe) if field.name not in PARAMETERS)


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add ``train`` to the commands of ``python -m kdlib``."""
    parser = commands.add_parser(
        "train",
        help="train a profile's teacher or students; under torchrun on several processes",
        description="Train what chapters 02, 03 and 05 train, or find it trained.",
        epilog="torchrun --nproc-per-node 2 -m kdlib train ... does it on two processes, or on two GPUs.",
    )
    parser.add_argument("--role", choices=(*ROLES, "soft_labels"), required=True, help="student: on the labels alone; "
                        "distilled: under the teacher, which is made first if it is missing")  # fmt: skip
    parser.add_argument("--profile", help="quick, laptop, full or auto: full with CUDA, else quick")
    parser.add_argument("--outputs", type=Path, help="the folder of artefacts, in place of $KDLIB_OUTPUTS")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
        help=f"change what the profile sets: {', '.join(OF_THE_PROFILE)}; or, in the recipe of the role's networks, "
        f"{', '.join(OF_THE_RECIPE)}",
    )  # fmt: skip
    parser.add_argument("--recipe", choices=RECIPES, help="in place of a profile; its images are in --data")
    parser.add_argument("--data", type=Path, help="the recipe's folder, laid out as its publisher does")
    parser.add_argument("--student", help="one of the recipe's; without it, the first")
    parser.add_argument("--soft-views", type=int, help="views whose logits are stored; 0: the recipe's teacher is live")
    parser.add_argument("--weights", type=Path, help="a file of torchvision's ResNet-50, for ImageNet's teacher")
    parser.add_argument("--miniature", action="store_true", help="the recipe in little, to see if everything is there")
    parser.set_defaults(run=_train)


def changed_profile(name: str, role: str, values: dict[str, object]) -> Profile:
    """The profile that a chapter with these parameters has, with a changed recipe of the role's networks.

    A changed recipe is part of the folder's name, as parameters are.

    Raises:
        ValueError: an unknown name, or a value out of range.
    """
    for key in values:
        if key not in OF_THE_PROFILE + OF_THE_RECIPE:
            known = OF_THE_PROFILE + OF_THE_RECIPE
            raise ValueError(f"{key} is unknown: expected one of {', '.join(known)}{did_you_mean(key, known)}")
    field = "teacher_recipe" if role == "teacher" else "student_recipe"
    own = {key: value for key, value in values.items() if key in OF_THE_RECIPE}
    try:
        settings = resolve(name, **{key: value for key, value in values.items() if key in OF_THE_PROFILE})
        recipe = dataclasses.replace(getattr(settings, field), **own)
    except TypeError as error:  # a text was compared with a number
        raise ValueError(f"{', '.join(f'{key}={value!r}' for key, value in values.items())}: {error}") from error
    if recipe == getattr(settings, field):
        return settings
    run = "-".join(filter(None, (settings.run, digest({field: own}))))
    return dataclasses.replace(settings, run=run, **{field: recipe})


def _train(options: argparse.Namespace) -> None:
    if options.outputs:
        os.environ["KDLIB_OUTPUTS"] = str(options.outputs)
    if bool(options.recipe) != bool(options.data) or (not options.recipe and options.role == "soft_labels"):
        raise ValueError("expected --recipe and --data together; only a recipe has the role soft_labels by itself")
    of_recipe = {f"--{name.replace('_', '-')}": getattr(options, name) for name in OF_A_RECIPE}
    of_profile = {"--profile": options.profile, "--set": options.set}
    for name, value in (of_profile if options.recipe else of_recipe).items():
        if value is not None and value is not False and value != []:
            raise ValueError(f"{name} has no meaning with{'' if options.recipe else 'out'} --recipe: leave it out")
    settings = changed_profile(options.profile or "auto", options.role, dict(map(_setting, options.set)))
    gpu.pick_device()  # joins the other processes, of which rank 0 prints, and warns of what all would warn of
    if ranks.rank():
        warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(None if ranks.rank() else sys.stdout):
        if options.recipe:
            _play(options)
        else:
            _train_role(options.role, settings, load_data(settings.dataset, **settings.images))
    ranks.stop()


def _play(options: argparse.Namespace) -> None:
    own = {name: getattr(options, name) for name in OF_A_RECIPE}
    made = distil(options.recipe, options.data, outputs_folder(), role=options.role, **own)
    scores = f": test accuracy {made.scores.accuracy:.2%}" if made.scores else ""
    print(f"{made.path or 'the teacher with torchvision’s weights'}{scores}")


def _train_role(role: str, settings: Profile, data: Data) -> None:
    teacher = None
    if role != "student":
        teacher = load_teacher(settings, data)
        _tell(teacher)
    if role == "distilled":
        views, images, _ = teacher.soft_labels.logits.shape
        print(f"{teacher.soft_labels.path}: logits of {images:,} images in {views} view{'s' if views > 1 else ''}")
    for network in settings.students if role != "teacher" else ():
        for seed in settings.seeds:
            _tell(load_student(settings, data, teacher, role, network, seed))


def _setting(text: str) -> tuple[str, object]:
    """From ``learning_rate=0.1`` to the name and the value; what is no number, truth value or null is a text."""
    name, sign, value = text.partition("=")
    if not sign:
        raise ValueError(f"--set {text!r}: expected NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _tell(trained: Network) -> None:
    made, epochs = trained.provenance, len(trained.history.loss)
    print(
        f"{trained.path}: validation accuracy {trained.history.accuracy[-1]:.2%} after {epochs} "
        f"epoch{'s' if epochs > 1 else ''}; trained in {made['seconds']:,.0f} s on {made['device']}"
    )
    if processes := record(trained.path).get("fingerprint", {}).get("processes"):
        print(
            f"  made by {processes} processes, with batch norm or dropout over a share of each batch; one process, "
            "such as a notebook's, trains its own in its place, and keeps this one as a backup"
        )
