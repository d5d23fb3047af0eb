"""Whether a network takes the images of a data set and returns one logit per class, and an objective has its labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from kdlib.data import ImageSet
from kdlib.evaluate import predict_logits


def check_fits(model: nn.Module, images: ImageSet) -> None:
    """Raise ValueError if a network fails on the first image of `images`, or does not return one logit per class."""
    height, width, channels = images.images.shape[1:]
    takes = f"one image of {width}x{height} pixels with {channels} channel{'s' if channels > 1 else ''}"
    device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
    returned: list[object] = []
    watch = model.register_forward_hook(lambda module, inputs, outputs: returned.append(outputs))
    try:
        first = replace(images, images=images.images[:1], labels=images.labels[:1])
        shape = tuple(predict_logits(model, first, device=device).shape)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(
            f"the network {type(model).__name__} fails on {takes} ({error}): expected logits (1, {images.classes}). "
            "Most often a layer is made for another size: read the images in that size, or let the network end in "
            "adaptive pooling"
        ) from error
    finally:
        watch.remove()
    if shape != (1, images.classes) or not isinstance(returned[0], Tensor):
        what = f"{shape}" if isinstance(returned[0], Tensor) else f"a {type(returned[0]).__name__}"
        raise ValueError(
            f"the network {type(model).__name__} returns {what} for {takes}, expected a tensor (1, {images.classes}): "
            f"one logit for each of {', '.join(images.class_names[:6])}{', …' * (images.classes > 6)}"
        )


def check_labels(data: ImageSet, loss_fn: Callable, targets: Callable | None) -> None:
    """ValueError if the objective asks for labels that images do not have, as far as its keywords show."""
    unlabelled = int((data.labels < 0).sum())
    if unlabelled and (targets is None or getattr(loss_fn, "keywords", {}).get("alpha")):
        raise ValueError(
            f"{unlabelled:,} of {len(data):,} images of {data.name} have no label (-1): expected a label for each, or "
            "targets of a teacher and alpha=0, which needs none"
        )
