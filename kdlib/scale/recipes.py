"""Two distillations that papers report on: TinyImageNet, which fits into a GPU's memory, and ImageNet, which does not.

Each role trains or makes what it needs, and finds again what is there:

    python -m kdlib train --recipe tiny_imagenet --data ~/data/tiny-imagenet-200 --role distilled
    torchrun --nproc-per-node 8 -m kdlib train --recipe imagenet --data /data/imagenet --role distilled
    make train PROCESSES=8 OPTIONS="--recipe imagenet --data /data/imagenet --role distilled"

The folders are as their publishers lay them out. TinyImageNet's archive unpacks to it:

    tiny-imagenet-200/  train/<class>/images/*.JPEG   val/images/*.JPEG   val/val_annotations.txt   test/ (no labels)
    imagenet/           train/<class>/*.JPEG          val/<class>/*.JPEG

The classes of ImageNet are the 1,000 synsets (n01440764, …), in whose order torchvision's weights have their outputs.

Nobody measured these recipes in this book: their settings are those of the sources named beside them. Temperature and
alpha are where a search starts that a claim needs, on the validation images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch.nn.functional as F
import torchvision
from torch import nn

from kdlib.data import Data
from kdlib.evaluate import Scores, evaluate
from kdlib.losses import distillation_loss
from kdlib.models import build
from kdlib.records.artefacts import did_you_mean
from kdlib.scale.compact_files import generate_compact
from kdlib.scale.stream import load_images
from kdlib.scale.views import SeededViews
from kdlib.soft_labels import LiveTeacher
from kdlib.sources.teachers import adapt_teacher
from kdlib.train import Recipe, Targets, load_or_train

ROLES = ("teacher", "soft_labels", "student", "distilled")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the images that torchvision's weights were trained on


def resnet50(classes: int, channels: int = 3) -> nn.Module:
    """torchvision's ResNet-50 (He et al., arXiv 1512.03385) as it is, for images of 224 pixels in colour."""
    return _in_colour(torchvision.models.resnet50, classes, channels)


def resnet18(classes: int, channels: int = 3) -> nn.Module:
    """torchvision's ResNet-18 (He et al., arXiv 1512.03385), likewise."""
    return _in_colour(torchvision.models.resnet18, classes, channels)


def mobilenet_v2(classes: int, channels: int = 3) -> nn.Module:
    """torchvision's MobileNetV2 (Sandler et al., arXiv 1801.04381), likewise."""
    return _in_colour(torchvision.models.mobilenet_v2, classes, channels)


def _in_colour(make, classes: int, channels: int) -> nn.Module:
    if channels != 3:
        raise ValueError(f"channels is {channels}: expected 3, since this network takes images in colour")
    return make(num_classes=classes)


@dataclass(frozen=True)
class ScaleRecipe:
    """All that a distillation is made of but the folder of the images."""

    size: int  # of the images that are kept, pixels
    validation: int | None  # training images held out; None: as load_images does it
    views: SeededViews | None  # None: in memory, with padding and mirroring
    teacher: str  # a network, as kdlib.build takes it
    teacher_recipe: Recipe | None  # None: torchvision's weights are used as they are
    students: Mapping[str, tuple[str, Recipe]]  # by name: a network, and how it is trained; the first is the usual one
    soft_views: int  # views whose logits are stored; 0: the teacher is asked live
    k: int  # logits kept of each image in each of these views
    temperature: float
    alpha: float
    padding: int = field(default=0)  # pixels, in memory

    def images(self) -> dict:
        """What :func:`kdlib.scale.load_images` is to be told."""
        how = {"views": self.views} if self.views else {"in_memory": True, "padding": self.padding, "flip": True}
        return {"size": self.size, "validation": self.validation, **how}


# batch 128, learning rate 0.1, weight decay 5e-4: Zagoruyko & Komodakis (arXiv 1605.07146, section 3), for small
# images, with half their 200 epochs; a cosine in place of steps: He et al. (arXiv 1812.01187, section 5.1)
_SMALL = Recipe(epochs=100, batch_size=128, learning_rate=0.1, weight_decay=5e-4, warmup=0.05)

# 90 epochs, batch 256, learning rate 0.1 and weight decay 1e-4: torchvision's references/classification, for ResNet,
# after He et al. (arXiv 1512.03385, section 3.4); five epochs of warm-up and a cosine: He et al. (arXiv 1812.01187,
# sections 3.1 and 5.1)
_RESNET = Recipe(epochs=90, batch_size=256, learning_rate=0.1, weight_decay=1e-4, warmup=5 / 90)

# 300 epochs, learning rate 0.045 and weight decay 4e-5: torchvision's references/classification, for MobileNetV2
_MOBILENET = replace(_RESNET, epochs=300, learning_rate=0.045, weight_decay=4e-5, warmup=5 / 300)

RECIPES = {
    "tiny_imagenet": ScaleRecipe(
        size=64,
        validation=5_000,
        views=None,
        padding=8,  # an eighth of the side, as 4 pixels of CIFAR-10's 32
        # trained on these training images alone: torchvision's weights have seen all of ImageNet, TinyImageNet's
        # validation and test images perhaps among them
        teacher="resnet50",
        teacher_recipe=_SMALL,
        students={"resnet18": ("resnet18", _SMALL), "mobilenet_v2": ("mobilenet_v2", _SMALL)},
        soft_views=32,
        k=200,  # all of them, 38 MB a view: at T = 4 what is left out would count
        temperature=4.0,
        alpha=0.1,
    ),
    "imagenet": ScaleRecipe(
        size=256,  # 252 GB
        validation=10_000,  # torchvision's weights were trained on them: for the students' choices only
        views=SeededViews(224, resize=256),
        teacher="kdlib.scale.recipes:resnet50",
        teacher_recipe=None,
        students={
            "resnet18": ("kdlib.scale.recipes:resnet18", _RESNET),
            "mobilenet_v2": ("kdlib.scale.recipes:mobilenet_v2", _MOBILENET),
        },
        soft_views=0,
        k=10,  # 53 MB a view in place of 2.5 GB
        # the teacher alone, in the very view that the student sees (Beyer et al., arXiv 2106.05237)
        temperature=1.0,
        alpha=0.0,
    ),
}


def in_little(recipe: ScaleRecipe) -> ScaleRecipe:
    """The same way through the code in little: small images, one epoch, a teacher without weights from elsewhere."""
    views = recipe.views and replace(recipe.views, size=14, resize=16)
    little = {"epochs": 1, "batch_size": 64, "learning_rate": 0.01}
    return replace(
        recipe,
        size=16 if views else 8,
        validation=None,
        views=views,
        padding=recipe.padding and 1,
        teacher_recipe=Recipe(**little),
        students={name: (network, Recipe(**little)) for name, (network, _) in recipe.students.items()},
        soft_views=2,
        k=2,
    )


class Outcome(NamedTuple):
    """What came of a role."""

    role: str
    path: Path | None  # the file; None for torchvision's teacher, which has none here
    scores: Scores | None  # on the test images; None of soft labels


def distil(
    recipe_name: str,
    root: str | PathLike,
    outputs: str | PathLike,
    *,
    role: str,
    student: str | None = None,
    seed: int = 0,
    soft_views: int | None = None,
    weights: str | PathLike | None = None,
    cache: str | PathLike | None = None,
    workers: int | None = None,
    device: str | None = None,
    progress: bool = True,
    miniature: bool = False,
) -> Outcome:
    """One role of a recipe: trained, or found in ``<outputs>/<recipe_name>/``, and measured on the test images.

    Args:
        recipe_name: one of ``RECIPES``.
        root: the folder of the images; see the top of this module.
        role: ``teacher``; ``soft_labels``; ``student``, on the labels alone; or ``distilled``, under the teacher.
        student: one of the recipe's students; None: the first.
        seed: of a student: its initial weights, the order and the views.
        soft_views: views whose logits are stored, and from which those of both students are drawn; 0: the teacher is
            asked live about any view; None: as the recipe has it.
        weights: a file of torchvision's ResNet-50 weights, for ImageNet's teacher where nothing can be downloaded.
        cache, workers: see :func:`kdlib.scale.load_images`.
        miniature: go the same way in little, to see whether everything is there.

    Raises:
        ValueError: an unknown recipe, role or student, or a folder with another layout.
        OSError: torchvision's weights are not there and cannot be downloaded.
    """
    for name, value, expected in (("recipe", recipe_name, RECIPES), ("role", role, ROLES)):
        if value not in expected:
            hint = did_you_mean(value, expected)
            raise ValueError(f"{name} is {value!r}: expected one of {', '.join(expected)}{hint}")
    recipe = in_little(RECIPES[recipe_name]) if miniature else RECIPES[recipe_name]
    student = student or next(iter(recipe.students))
    if student not in recipe.students:
        raise ValueError(f"student is {student!r}: expected one of {', '.join(recipe.students)}")
    folder = Path(outputs) / (f"{recipe_name}_miniature" if miniature else recipe_name)
    data = load_images(root, **recipe.images(), cache=cache, workers=workers, progress=progress)
    options = {"device": device, "progress": progress}
    views = recipe.soft_views if soft_views is None else soft_views
    teacher = path = targets = None
    if role != "student":
        teacher, path = _teacher(recipe, data, folder, weights, options)
    if role == "soft_labels" and not views:
        raise ValueError(
            "soft_views is 0: expected how many views to store; with 0 the student's teacher is asked live"
        )
    if role == "soft_labels" or (role == "distilled" and views):
        targets = generate_compact(folder / "soft_labels", teacher, data.train, views, recipe.k, **options)
    if role == "teacher":
        return Outcome(role, path, evaluate(teacher, data.test, device=device))
    if role == "soft_labels":
        return Outcome(role, targets.path, None)
    if role == "distilled":
        targets = targets or LiveTeacher(teacher)
    network, how = recipe.students[student]
    how = replace(how, seed=seed, views=views or None)  # both roles alike, so that they see the same images
    return _student(recipe, data, folder, student, network, how, targets, options)


def _teacher(recipe: ScaleRecipe, data: Data, folder: Path, weights, options: dict) -> tuple[nn.Module, Path | None]:
    """The teacher, and its file if it was trained here."""
    if recipe.teacher_recipe is not None:
        file = f"teacher_{recipe.teacher.rpartition(':')[2]}.pth"
        how = {"validation": data.validation, **options}
        made = load_or_train(folder, file, recipe.teacher, data.train, F.cross_entropy, recipe.teacher_recipe, **how)
        return made.model, made.path
    # not the second version: a teacher trained with label smoothing, as that one was, teaches worse (Müller et al.,
    # arXiv 1906.02629)
    known = torchvision.models.ResNet50_Weights.IMAGENET1K_V1
    try:
        weights = known.get_state_dict(progress=options["progress"], check_hash=True) if weights is None else weights
    except OSError as error:
        raise OSError(
            f"torchvision's weights cannot be downloaded ({error}): fetch {known.url} elsewhere, and give the file as "
            "weights"
        ) from error
    return adapt_teacher(build(recipe.teacher, 1000), data, weights=weights, mean=MEAN, std=STD), None


def _student(recipe, data: Data, folder: Path, name: str, network, how, targets: Targets | None, options) -> Outcome:
    role, loss_fn = "student", F.cross_entropy
    if targets is not None:
        role = "distilled"
        loss_fn = partial(distillation_loss, temperature=recipe.temperature, alpha=recipe.alpha)
    file = f"{role}_{name}{f'_seed{how.seed}' * (how.seed > 0)}.pth"
    more = {"targets": targets, "validation": data.validation, **options}
    made = load_or_train(folder, file, network, data.train, loss_fn, how, **more)
    return Outcome(role, made.path, evaluate(made.model, data.test, device=options["device"]))
