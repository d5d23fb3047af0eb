"""A checklist that is code: :func:`preflight` looks at everything a distillation is made of, and says what is odd."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlib.checks.fits import check_fits
from kdlib.checks.logits import FEWEST, check_finite, check_logits, examine
from kdlib.checks.objective import look_at_loss
from kdlib.data import Batch, Data, ImageSet, Targets
from kdlib.models import build
from kdlib.soft_labels import LiveTeacher, SoftLabels
from kdlib.sources.order import canonical_order
from kdlib.train import Recipe, train

FEW = 10  # images of a class, below which its accuracy says little
STEPS = 30  # of the trial training
FAILS = "the network "  # how the message of check_fits begins


@dataclass(frozen=True)
class Finding:
    """One thing that looks odd, or that was looked at and looks right."""

    about: str  # data, teacher, student, loss, or first steps
    text: str
    odd: bool

    def __str__(self) -> str:
        return f"{'!' if self.odd else '✓'} {self.about}: {self.text}"


def preflight(
    data: Data | ImageSet,
    *,
    student: str | Callable[[int, int], nn.Module] | nn.Module | None = None,
    teacher: nn.Module | None = None,
    targets: Callable[[Batch], Tensor] | None = None,
    loss_fn: Callable[..., Tensor] | None = None,
    recipe: Recipe | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    device: str | torch.device = "cpu",
) -> list[Finding]:
    """Look at what a distillation is made of, print what looks odd, and return all that was looked at.

    Nothing that is given is changed, except that a teacher's mode is put back as it was. What is not given is
    skipped. It takes seconds: some hundred images, and a few steps of a copy of the student.

    Args:
        data: a data set, or its training images.
        student: as :func:`kdlib.build` takes it, or a network.
        teacher: the network itself.
        targets: soft labels or a live teacher, as :func:`kdlib.train` takes them.
        loss_fn: ``loss_fn(student_logits, teacher_logits, labels)``; of the teacher, only its gradient and scale are
            compared with :func:`kdlib.distillation_loss`.
        recipe: of the student.
        optimizer: of a loop of your own: it must hold the student's parameters and none of the teacher's.
    """
    images = data.train if isinstance(data, Data) else data
    findings = [*_of_data(data)]
    if teacher is None and isinstance(targets, LiveTeacher):
        teacher = targets.model
    learns_from = LiveTeacher(teacher) if targets is None and teacher is not None and loss_fn is not None else targets
    if teacher is not None:
        labelled = images if (images.labels >= 0).any() or not isinstance(data, Data) else data.validation
        findings += _of_teacher(teacher, labelled)
    model = None
    if student is not None:
        model = student if isinstance(student, nn.Module) else build(student, images.classes, images.channels, seed=0)
        model = copy.deepcopy(model)
        findings += _of_student(model, images, teacher, recipe)
    if optimizer is not None:
        findings += _of_optimizer(optimizer, student if isinstance(student, nn.Module) else None, teacher)
    if targets is not None:
        findings += _of_targets(targets, images, recipe)
    if loss_fn is not None and (targets is not None or teacher is not None):
        findings += [Finding("loss", text, odd) for text, odd in look_at_loss(loss_fn, images.classes)]
    broken = any(f.odd and (f.about == "targets" or f.text.startswith(FAILS)) for f in findings)
    if model is not None and recipe is not None and not broken:
        findings += _of_first_steps(model, images, loss_fn, recipe, learns_from, device)
    for finding in findings:
        print(finding)
    odd = sum(finding.odd for finding in findings)
    print(f"{odd} of {len(findings)} looks odd" if odd == 1 else f"{odd} of {len(findings)} look odd")
    return findings


# --- data -----------------------------------------------------------------------------------------------------------


def _of_data(data: Data | ImageSet) -> list[Finding]:
    splits = data._asdict() if isinstance(data, Data) else {"train": data}
    train, found = splits["train"], []

    def say(text: str, odd: bool) -> None:
        found.append(Finding("data", text, odd))

    for split, images in splits.items():
        labels = images.labels[images.labels >= 0].cpu()
        counts = labels.bincount(minlength=images.classes)
        rare = [images.class_names[c] for c in (counts < FEW).nonzero().flatten().tolist()]
        if rare and len(labels):
            more = f" and {len(rare) - 1} more class{'es' * (len(rare) > 2)} have" if len(rare) > 1 else " has"
            say(f"{rare[0]!r}{more} fewer than {FEW} {split} images", True)
        if isinstance(images.images, Tensor):
            flat = images.images.flatten(1)
            if blank := int((flat.amin(1) == flat.amax(1)).sum()):
                say(f"{_images(blank, split)} of one colour", True)
    unlabelled = int((train.labels < 0).sum())
    if unlabelled < len(train):
        counts = train.labels[train.labels >= 0].cpu().bincount(minlength=train.classes)
        least, most = int(counts.min()), int(counts.max())
        say(f"the classes have {least} to {most} training images", least * 10 < most)
    if unlabelled:
        say(f"{_images(unlabelled, 'training')} without a label: the loss needs alpha=0", False)
    loaded = {name: own for name, own in splits.items() if isinstance(own.images, Tensor)}
    seen = {n: set(canonical_order(s.images.cpu().numpy(), s.labels.cpu().numpy())[1]) for n, s in loaded.items()}
    for split in seen:
        if split != "train":
            shared = len(seen["train"] & seen[split])
            say(f"{_images(shared, split)} among the training images too", shared > 0)
    if not loaded:
        say("the images lie on a disk: not looked at for copies and for images of one colour", False)
    if train.resolve_views(None) == 1:
        say("there is one view per image: no augmentation", False)
    return found


def _images(count: int, split: str) -> str:
    return f"{count} {split} image{' is' if count == 1 else 's are'}"


# --- teacher, student, optimizer ------------------------------------------------------------------------------------


def _of_teacher(teacher: nn.Module, images: ImageSet) -> list[Finding]:
    found = []
    modes = {module: module.training for module in teacher.modules()}
    if any(modes.values()):
        found.append(Finding("teacher", "it is in train mode: dropout and batch statistics change its logits", True))
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            examine(teacher.eval(), images)
        found += [Finding("teacher", str(warning.message), True) for warning in said]
        if not said:
            enough = int((images.labels >= 0).sum()) >= FEWEST
            agrees = "agree with most labels" if enough else "there are too few labels to compare with"
            found.append(Finding("teacher", f"its logits are finite, and {agrees}", False))
    except ValueError as error:
        found.append(Finding("teacher", str(error), True))
    finally:
        for module, mode in modes.items():
            module.training = mode
    return found


def _of_student(model: nn.Module, images: ImageSet, teacher: nn.Module | None, recipe: Recipe | None) -> list[Finding]:
    found = []
    try:
        check_fits(model, images)
    except ValueError as error:
        return [Finding("student", str(error), True)]
    found.append(
        Finding("student", f"it takes the images, and gives one logit for each of {images.classes} classes", False)
    )
    if teacher is not None:
        sizes = [sum(weight.numel() for weight in network.parameters()) for network in (model, teacher)]
        found.append(
            Finding("student", f"{sizes[0]:,} parameters, the teacher has {sizes[1]:,}", sizes[0] > sizes[1] > 0)
        )
    if recipe is not None:
        steps = recipe.epochs * max(1, len(images) // min(recipe.batch_size, len(images)))
        found.append(
            Finding("student", f"{steps:,} steps of {min(recipe.batch_size, len(images))} images", steps < 100)
        )
    return found


def _of_optimizer(
    optimizer: torch.optim.Optimizer, student: nn.Module | None, teacher: nn.Module | None
) -> list[Finding]:
    held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    found = []
    if teacher is not None:
        own = sum(id(weight) in held for weight in teacher.parameters())
        found.append(Finding("optimizer", f"it holds {own} tensors of the teacher", own > 0))
    if student is not None:
        missing = [
            name for name, weight in student.named_parameters() if weight.requires_grad and id(weight) not in held
        ]
        text = f"it lacks {missing[0]} of the student" if missing else "it holds all of the student's parameters"
        found.append(Finding("optimizer", text, bool(missing)))
    return found


def _of_targets(targets: Callable, images: ImageSet, recipe: Recipe | None) -> list[Finding]:
    found = []
    recipe = recipe or Recipe(epochs=1, batch_size=1, learning_rate=1.0, views=getattr(targets, "views", None))
    try:
        if isinstance(targets, Targets) and not isinstance(targets, LiveTeacher):
            targets.check(images, recipe)
            if recipe.cutout or recipe.mixup:
                text = "soft labels hold plain views, and the recipe has cutout or mixup: use a LiveTeacher"
                found.append(Finding("targets", text, True))
        if isinstance(targets, SoftLabels):
            for view, logits in enumerate(targets.logits):
                check_finite(logits, images, view)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                check_logits(targets.logits[0].float(), images)
            found += [Finding("targets", str(warning.message), True) for warning in said]
        elif not isinstance(targets, Targets):
            found.append(Finding("targets", "a function of your own: nothing tells whether it fits the images", False))
    except ValueError as error:
        found.append(Finding("targets", str(error), True))
    if not found:
        found.append(Finding("targets", "they fit the images, and the views that the recipe draws", False))
    return found


# --- first steps ----------------------------------------------------------------------------------------------------


def _of_first_steps(
    model: nn.Module,
    images: ImageSet,
    loss_fn: Callable | None,
    recipe: Recipe,
    targets: Callable | None,
    device: str | torch.device,
) -> list[Finding]:
    """A few steps on a few images again and again: the loss must fall, and further than at a tenth of the rate."""
    size = min(recipe.batch_size, len(images))
    few = replace(images, images=images.images[:size], labels=images.labels[:size])
    if isinstance(targets, SoftLabels):
        targets = SoftLabels(targets.logits[:, :size], few.identity)
    elif isinstance(targets, LiveTeacher):  # training puts its model into eval mode, and moves it
        targets = LiveTeacher(copy.deepcopy(targets.model))
    elif isinstance(targets, Targets):  # a lookup of other images than these few; their numbers are the same
        targets = targets.to(device).__call__
    trial = replace(recipe, epochs=STEPS, batch_size=size, mixup=0.0, cutout=0)
    loss_fn, losses = loss_fn or F.cross_entropy, []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for rate in (recipe.learning_rate, recipe.learning_rate / 10):
                once, own = replace(trial, learning_rate=rate), copy.deepcopy(model)
                losses.append(train(own, few, loss_fn, once, targets=targets, device=device, progress=False).loss)
    except (ValueError, TypeError, AttributeError, FloatingPointError, RuntimeError) as error:
        return [Finding("first steps", str(error), True)]
    (first, *_, last), (*_, slower) = losses
    text = f"in {STEPS} steps on one batch the loss goes from {first:.3g} to {last:.3g}"
    if last > 0.1 * first and slower < 0.9 * last:
        return [Finding("first steps", f"{text}, and to {slower:.3g} at a tenth of the learning rate: lower it", True)]
    hardly = last > 0.9 * first
    return [Finding("first steps", f"{text}: raise the learning rate" if hardly else text, hardly)]
