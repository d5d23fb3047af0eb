"""The teacher's answers, saved: generated once, reused by every student. And the live teacher, for what has no list.

Both are *target sources*: ``(images, indices, views) -> teacher_logits`` (B, C). Soft labels look the answer up by the
image's index and its view; the live teacher computes it from the very pixels the student sees.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from kdlib import artefacts
from kdlib.data import Data, ImageSet
from kdlib.models import mixed_precision, pick_device, predict_logits, quicker
from kdlib.profiles import Profile
from kdlib.train import Trained


@dataclass(frozen=True)
class SoftLabels:
    """The teacher's logits for the first V views of N images: a target source by lookup."""

    logits: Tensor  # (V, N, C) float16; logits, not probabilities, so that any temperature can be chosen later
    fingerprint: dict  # what they were made from

    def __call__(self, images: Tensor, indices: Tensor, views: Tensor | None) -> Tensor:
        """The teacher's logits (B, C) float32 for those images in those views."""
        if views is None:
            raise ValueError(
                "these images were changed by cutout or mixup after their view was drawn: soft labels hold plain views "
                "only; set cutout and mixup to 0 in the student's recipe, or use LiveTeacher"
            )
        return self.logits[views, indices].float()

    @property
    def views(self) -> int:
        return len(self.logits)

    def to(self, device: torch.device | str) -> SoftLabels:
        return replace(self, logits=self.logits.to(device))

    def describe(self) -> dict:
        return self.fingerprint

    def check(self, data: ImageSet, recipe) -> None:
        """Raise ValueError where these are not the soft labels of `data` in every view that `recipe` draws."""
        check_array(self.logits, data)
        made_for = self.fingerprint.get("data")
        if made_for != f"{data.name} {data.fingerprint}":
            raise ValueError(
                f"the soft labels are of {made_for}, the images of {data.name} {data.fingerprint}: expected the same "
                "images in the same order; generate them for these (chapter 03)"
            )
        wanted = recipe.views or len(data.view_table)
        if wanted > self.views:
            raise ValueError(
                f"the student would see {wanted} views, the soft labels hold {self.views}: generate more views "
                f"(chapter 03), or set views={self.views} in the student's recipe"
            )


@dataclass(frozen=True)
class LiveTeacher:
    """The teacher itself, asked about the very images that the student sees: a target source by computation."""

    model: nn.Module
    fingerprint: dict  # what the teacher was made from

    def __call__(self, images: Tensor, indices: Tensor, views: Tensor | None) -> Tensor:
        """The teacher's logits (B, C) float32: in eval mode, without gradients."""
        if self.model.training:
            raise ValueError(
                "the teacher is in train mode: its answers would depend on the batch, and its running statistics would "
                "change; call teacher.eval(), and keep the teacher out of any module whose train() is called"
            )
        with torch.no_grad(), mixed_precision(images.device):
            return self.model(images).float()

    def to(self, device: torch.device | str) -> LiveTeacher:
        model = self.model.to(device, memory_format=torch.channels_last).eval()
        return replace(self, model=quicker(model, torch.device(device), answers=True))

    def describe(self) -> dict:
        return self.fingerprint

    def check(self, data: ImageSet, recipe) -> None:
        self.model.eval()


def generate(
    teacher: nn.Module,
    data: ImageSet,
    views: int,
    *,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> np.ndarray:
    """The teacher's logits for the first `views` views of all images: (V, N, C) float16.

    Half precision keeps a logit of 20 to within 0.008, far below what one seed of the teacher differs from the next.

    Raises:
        ValueError: more views than `data` has.
    """
    if not 1 <= views <= len(data.view_table):
        raise ValueError(
            f"views is {views}: expected 1 (the clean image) to {len(data.view_table)}, which is all that {data.name} "
            f"has with {data.padding} pixels of padding and flip={data.flip}"
        )
    device = pick_device(device)
    data = data.to(device)
    teacher = quicker(teacher.to(device, memory_format=torch.channels_last).eval(), device, answers=True)
    logits = np.empty((views, len(data), data.classes), np.float16)
    largest = float(np.finfo(np.float16).max)  # a hardly trained teacher may exceed it; infinity would end the training
    quiet = {} if progress else {"disable": True}  # left out where not needed, so that TQDM_DISABLE=1 is heard
    for view in tqdm(range(views), unit="view", leave=False, **quiet):
        logits[view] = predict_logits(teacher, data, view=view, device=device).clamp(-largest, largest).numpy()
    return logits


def load_or_generate(
    folder: Path,
    teacher: Trained,
    data: ImageSet,
    views: int,
    *,
    file: str = "soft_labels.npy",
    device: str | torch.device | None = None,
    progress: bool = True,
) -> SoftLabels:
    """The soft labels of `data` by `teacher`: loaded where `folder` holds just those, otherwise generated and saved."""
    fingerprint = {"data": f"{data.name} {data.fingerprint}", "views": views, "teacher": teacher.fingerprint}
    path = artefacts.find(folder, file, fingerprint)
    if path is None:
        artefacts.check_writable(folder)  # shows itself before the teacher runs, not after it
        path, start = folder / file, time.perf_counter()
        logits = generate(teacher.model, data, views, device=device, progress=progress)
        known = {"provenance": artefacts.provenance(pick_device(device), time.perf_counter() - start)}
        artefacts.save_array(path, logits, fingerprint=fingerprint, **known)
    return load_soft_labels(path, data)


def load_soft_labels(path: Path, data: ImageSet) -> SoftLabels:
    """The soft labels of a file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is damaged, or whose array does not fit `data`.
    """
    logits = torch.from_numpy(artefacts.load_array(path))
    check_array(logits, data, str(path))
    return SoftLabels(logits, artefacts.record(path).get("fingerprint", {}))


def load_published(profile: Profile, data: Data) -> tuple[SoftLabels, dict[str, Tensor]]:
    """The published answers of a profile's teacher, for who starts without it: see :func:`kdlib.artefacts.published`.

    Returns:
        The soft labels, in as many views as were published; and the logits (N, C) float32 of every split's clean
        images, by ``train``, ``validation``, ``test``. They were rounded to half precision.

    Raises:
        FileNotFoundError: nothing is published at this profile, or it cannot be fetched.
        ValueError: a damaged file, or answers to other images than those of `data`.
    """
    names = ("soft_labels.npy", "teacher_logits.npy")
    paths = [artefacts.published(profile.name, name, profile.folder) for name in names]
    views, clean = (artefacts.record(path)["fingerprint"] for path in paths)
    answered = {"train": views["data"], "validation": clean["validation"], "test": clean["test"]}
    for images, made_for in zip(data, answered.values(), strict=True):
        if made_for != f"{images.name} {images.fingerprint}":
            reason = f"limit is {profile.limit}; leave it out" if profile.limit else "the data set is another one"
            raise ValueError(
                f"the published answers are to {made_for}, the images here are {images.name} {images.fingerprint}, "
                f"expected the same: {reason}, or run the earlier chapters instead (start_from=scratch)"
            )
    soft_labels = load_soft_labels(paths[0], data.train)
    logits = torch.from_numpy(artefacts.load_array(paths[1])).float()
    sizes = [len(data.validation), len(data.test)]
    if logits.shape != (sum(sizes), data.train.classes) or views["teacher"] != clean["teacher"]:
        raise ValueError(
            f"{paths[1].name} {tuple(logits.shape)} does not belong to {paths[0].name}: expected the same teacher's "
            f"answers {(sum(sizes), data.train.classes)}; publish both anew (`make publish PROFILE={profile.name}`)"
        )
    validation, test = logits.split(sizes)
    return soft_labels, {"train": soft_labels.logits[0].float(), "validation": validation, "test": test}


def published_note(profile: Profile, soft_labels: SoftLabels) -> str:
    """In words, for the page: whose answers a run without a teacher starts from."""
    path = artefacts.published(profile.name, "soft_labels.npy", profile.folder)
    made = artefacts.record(path)["provenance"]
    return (
        "**Started from what is published.** The teacher's answers on this page are the recorded ones of profile "
        f"{profile.name}: {soft_labels.views} view{'s' if soft_labels.views > 1 else ''} of each training image, and "
        f"the clean validation and test images, made on {made['device']}, {made['date']}. Their SHA-256 is that of the "
        "record, and the images are those that they were made for."
    )


def check_array(logits: Tensor, data: ImageSet, source: str = "the soft labels") -> None:
    """Raise ValueError where `logits` are not (V, N, C) for the images and classes of `data`."""
    if logits.ndim != 3 or logits.shape[1:] != (len(data), data.classes) or not logits.is_floating_point():
        raise ValueError(
            f"{source}: {logits.dtype} {tuple(logits.shape)}, expected floats (V, {len(data)}, {data.classes}): V "
            f"views of the {len(data)} images of {data.name}; generate them for this data set and split (chapter 03)"
        )
