"""The teacher's logits, saved: generated once, reused by every student. And the live teacher, for what has no list.

Both are *targets*: from a batch to the teacher's logits (B, C). Soft labels look them up by each image's index and its
view; the live teacher computes them from the very pixels that the student sees.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from kdlib import gpu
from kdlib.checks.logits import check_finite, check_pairing, check_plain, examine
from kdlib.data import Batch, ImageSet
from kdlib.evaluate import outputs_of, predict_logits
from kdlib.gpu import ranks
from kdlib.losses import at_least_float32
from kdlib.records import artefacts, identity
from kdlib.train import Recipe, Targets, progress_bar

FAR = 256.0  # half precision keeps a logit of this size to within 1/16


@dataclass(frozen=True)
class SoftLabels(Targets):
    """The teacher's logits for the first V views of N images: targets by lookup."""

    logits: Tensor  # (V, N, C) float16; logits, not probabilities, so that any temperature can be chosen later
    data: str  # the `identity` of the ImageSet that they are for
    path: Path | None = None  # the file that they were loaded from

    def __call__(self, batch: Batch) -> Tensor:
        """The teacher's logits (B, C) float32 for those images in those views."""
        check_plain(batch)
        return at_least_float32(self.logits[batch.views, batch.indices])

    @property
    def views(self) -> int:
        """How many views of each image there are."""
        return len(self.logits)

    @property
    def identity(self) -> dict:
        """What they are: the content of the array, read once and again whenever it was changed in place."""
        kept = self.__dict__
        if kept.get("_version") != self.logits._version:
            kept.update(_version=self.logits._version, _content=identity.content(self.logits))
        return {"soft_labels": kept["_content"], "views": self.views}

    def to(self, device: torch.device | str) -> SoftLabels:
        """The same in the memory of `device`."""
        logits = self.logits.to(device)
        return self if logits is self.logits else replace(self, logits=logits)

    def check(self, data: ImageSet, recipe: Recipe) -> None:
        """Raise ValueError if these are not the soft labels of `data` in every view that `recipe` draws."""
        check_array(self.logits, data)
        check_pairing(self.data, self.views, data, data.resolve_views(recipe.views))


class LiveTeacher(Targets):
    """The teacher itself, asked about the very images that the student sees: targets by computation.

    Args:
        model: from (B, C, H, W) images, normalised as the student's are, to (B, C) logits for the classes in the
            student's order. It is put into eval mode before training starts, and never trained.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._run, self._layout = model, None

    def __call__(self, batch: Batch) -> Tensor:
        """The teacher's logits (B, C) float32: in eval mode, without gradients."""
        if self.model.training:
            raise ValueError(
                "the teacher is in train mode: its logits would depend on the batch, and its running statistics would "
                "change; call teacher.eval(), and keep the teacher out of any module whose train() is called"
            )
        device = batch.images.device
        if self._layout is None:
            self._layout = gpu.place(self.model, device, batch.images)
            self._run = gpu.optimize_for_gpu(self.model, device, self._layout, for_inference=True)
        with torch.no_grad(), gpu.mixed_precision(device):
            return at_least_float32(outputs_of(self._run(gpu.lay_out(batch.images, self._layout))))

    @property
    def identity(self) -> dict:
        """What it is now: its architecture, and the content of its weights."""
        return {"live_teacher": identity.network(self.model), "weights": identity.weights(self.model)}

    def to(self, device: torch.device | str) -> LiveTeacher:
        """The same in the memory of `device`."""
        return LiveTeacher(self.model.to(device))

    def check(self, data: ImageSet, recipe: Recipe) -> None:
        """Put the teacher into eval mode, and look at what it says of some images (:mod:`kdlib.checks.logits`)."""
        examine(self.model.eval(), data)


def generate(
    teacher: nn.Module,
    data: ImageSet,
    views: int,
    *,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> np.ndarray:
    """The teacher's logits for the first `views` views of all images: (V, N, C) float16.

    Half precision keeps a logit of 20 to within 0.008, far below what one seed of the teacher differs from the next;
    of larger ones see :func:`in_half`.
    Under ``torchrun`` every process makes this call, asks its teacher about a share of the images, and returns all.

    Raises:
        ValueError: more views than `data` has, or a teacher that gives no finite (N, classes) logits. A warning says if
            they agree with few labels (:func:`kdlib.checks.logits.check_logits`).
    """
    views = data.resolve_views(views)
    device = gpu.pick_device(device)
    data = data.to(device)
    examine(teacher.eval().to(device), data)
    layout = gpu.place(teacher, device, data.example)
    teacher = gpu.optimize_for_gpu(teacher, device, layout, for_inference=True)
    logits = np.empty((views, len(data), data.classes), np.float16)
    with progress_bar(views, progress, unit="view") as bar:
        for view in range(views):
            made = predict_logits(teacher, data, view=view, device=device)
            check_finite(made, data, view)
            logits[view] = in_half(made).numpy()
            bar.update()
    return logits


def in_half(logits: Tensor) -> Tensor:
    """Logits (B, C) in half precision, finite.

    Half precision is coarse far from zero: beyond 2,048 neighbouring numbers are 2 apart. So where the largest logit of
    an image is above 256 or below -256, it is subtracted from all of the image's logits. No softmax sees that; a loss
    that compares the logits themselves does.
    """
    logits = at_least_float32(logits)
    largest = logits.amax(1, keepdim=True)
    shift = largest.where(largest.isfinite() & (largest.abs() > FAR), 0)
    most = torch.finfo(torch.float16).max  # a hardly trained teacher may exceed it; infinity would end the training
    return (logits - shift).clamp_(-most, most).half()


def load_or_generate(
    folder: str | PathLike,
    teacher: nn.Module,
    data: ImageSet,
    views: int | None,
    *,
    file: str = "soft_labels.npy",
    device: str | torch.device | None = None,
    progress: bool = True,
) -> SoftLabels:
    """The soft labels of `data` by `teacher`: loaded if `folder` holds just those, otherwise generated and saved.

    What is matched: the images, the number of views (None: all there are), and the teacher's weights.
    """
    if views is None and data.resolve_views(None) >= 2**31:  # by seed, without end
        raise ValueError(f"views is None: expected a number, since {data.name} has views without end")
    folder, views, device = Path(folder), data.resolve_views(views), gpu.pick_device(device)
    made_from = {"data": data.identity, "views": views, "teacher": LiveTeacher(teacher).identity}
    with artefacts.reserve(folder, file, made_from) as path:
        if path:
            return load_soft_labels(path, data)
        path, start = folder / file, time.perf_counter()
        artefacts.check_room(path, 2 * views * len(data) * data.classes)  # before the teacher runs, not after it
        logits = generate(teacher, data, views, device=device, progress=progress)
        if not ranks.rank():
            made = artefacts.provenance(device, time.perf_counter() - start)
            artefacts.save_array(path, logits, fingerprint=made_from, provenance=made)
    return load_soft_labels(path, data)


def load_soft_labels(path: str | PathLike, data: ImageSet) -> SoftLabels:
    """The soft labels of a file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is damaged, or whose array does not fit `data`.
    """
    path = Path(path)
    logits = torch.from_numpy(artefacts.load_array(path))
    check_array(logits, data, str(path))
    made_for = artefacts.record(path).get("fingerprint", {}).get("data", "images that no record names")
    return SoftLabels(logits, made_for, path)


def check_array(logits: Tensor, data: ImageSet, source: str = "the soft labels") -> None:
    """Raise ValueError if `logits` are not (V, N, C) for the images and classes of `data`."""
    if logits.ndim != 3 or logits.shape[1:] != (len(data), data.classes) or not logits.is_floating_point():
        raise ValueError(
            f"{source}: {logits.dtype} {tuple(logits.shape)}, expected floats (V, {len(data)}, {data.classes}): V "
            f"views of the {len(data)} images of {data.name}; generate them for this data set and split (chapter 03)"
        )
