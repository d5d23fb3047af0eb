"""A network in a file, by itself: ``.onnx``, or ``.pth`` with what its record tells of the network and its images."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from kdlib.datasets import load_data
from kdlib.deploy.export import FromPixels, OnnxModel
from kdlib.evaluate import load_results
from kdlib.models import NETWORKS, build
from kdlib.profiles import Profile
from kdlib.records import artefacts
from kdlib.records.documents import NUMBER, mismatch
from kdlib.records.fetch import clone_folder, published_file
from kdlib.sources.known import DATA_SETS
from kdlib.sources.pictures import read_picture, resized

_FORMAT = {"shape": [int], "mean": [NUMBER], "std": [NUMBER], "class_names": [str]}


@dataclass(frozen=True)
class SavedNetwork:
    """A network from a file of weights, and the format of its images (see ``ImageSet.format``)."""

    model: nn.Module  # in eval mode
    format: dict
    fingerprint: dict


def load_saved(
    path: str | os.PathLike, *, network: str | Callable | None = None, dataset: str | os.PathLike | None = None
) -> SavedNetwork:
    """The network in a file of weights.

    Args:
        path: weights that :func:`kdlib.load_or_train` saved, with their record ``<path>.json`` beside them.
        network: as :func:`kdlib.build` takes it; None: the one of kdlib's own that the record names. A name in a file
            never chooses code of yours: for a network of your own say which.
        dataset: what it was trained on, as :func:`kdlib.load_data` takes it; needed only for records that are older
            than their field ``format``, of a data set of your own.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no record, a network that is not kdlib's own, or weights that do not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there: expected a file of weights, such as outputs/full/student_cnn.pth"
        )
    artefacts.check_content(path)
    record = artefacts.record(path)
    fingerprint = record.get("fingerprint", {})
    named = fingerprint.get("network")
    named = named.get("name") if isinstance(named, dict) else named  # older records have the name alone
    if network is None and named not in NETWORKS:
        wanted = f"its record names {named!r}, which is not one of kdlib's own" if named else "it has no record"
        raise ValueError(f"{path}: {wanted}; say which network it is (--network package.module:function)")
    about = record.get("format") or _format_of(path, dataset or str(fingerprint.get("data", "")).partition("/")[0])
    wrong = mismatch(about, _FORMAT)
    if wrong := wrong or (f"shape {about['shape']}" if len(about["shape"]) != 3 else ""):
        raise ValueError(f"{path}: its record does not describe its images ({wrong}): train the network again")
    model = build(network or named, len(about["class_names"]), about["shape"][2])
    return SavedNetwork(artefacts.load_weights(path, model).eval(), about, fingerprint)


def _format_of(path: Path, dataset: str | os.PathLike) -> dict:
    if not dataset or (isinstance(dataset, str) and dataset not in DATA_SETS and not Path(dataset).exists()):
        raise ValueError(
            f"{path}: its record does not tell the size, scale and classes of its images; say what it was trained on "
            f"(--dataset, one of {', '.join(DATA_SETS)} or a path)"
        )
    return load_data(dataset).train.format


def read_pixels(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
    """A picture as a network takes it: (H, W, C) uint8, its shorter side resized and a square cut from its centre.

    Raises:
        ValueError: no picture, or a network whose images are not square or neither grey nor in colour.
    """
    height, width, channels = shape
    if channels not in (1, 3):
        raise ValueError(f"the network takes {channels} channels, expected 1 or 3: a picture has no others")
    pixels, _ = read_picture(path)
    if pixels.shape[:2] != (height, width):
        if height != width:
            raise ValueError(f"{path} is {pixels.shape[1]}x{pixels.shape[0]}, the network takes {width}x{height}")
        pixels = resized(pixels[None], height)[0]
    return pixels if channels == 3 else np.asarray(Image.fromarray(pixels).convert("L"))[..., None]


def predict(
    path: str | os.PathLike,
    pictures: list[Path],
    *,
    temperature: float | None = None,
    network: str | Callable | None = None,
    dataset: str | os.PathLike | None = None,
) -> tuple[torch.Tensor, tuple[str, ...]]:
    """The probabilities (N, classes) of pictures by the network in a file, ``.onnx`` or ``.pth``; and the classes.

    Args:
        temperature: of the softmax; None: the one in the ONNX file, 1 for weights.
        network, dataset: see :func:`load_saved`.
    """
    if temperature is not None and not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}: expected a number above 0")
    if Path(path).suffix == ".onnx":
        model = OnnxModel(path)
        shape, names, told = model.shape, model.class_names, model.temperature
        pixels = np.stack([read_pixels(Path(picture), shape) for picture in pictures])
        logits = model.predict_logits(pixels)
    else:
        saved = load_saved(path, network=network, dataset=dataset)
        shape, names, told = tuple(saved.format["shape"]), tuple(saved.format["class_names"]), 1.0
        pixels = np.stack([read_pixels(Path(picture), shape) for picture in pictures])
        with torch.no_grad():
            logits = FromPixels(saved.model, saved.format["mean"], saved.format["std"])(torch.from_numpy(pixels))
    return (logits / (told if temperature is None else temperature)).softmax(1), names


def published_student(settings: Profile, network: str, seed: int) -> nn.Module:
    """The distilled student whose weights the repository holds, in eval mode.

    Raises:
        FileNotFoundError: nothing is published at this profile, or it cannot be fetched.
    """
    name = settings.file("distilled", network, seed)
    path = published_file(settings.name, name, artefacts.base_folder(settings.folder))
    return load_saved(path, network=network, dataset=settings.dataset).model


def reported_accuracy(settings: Profile, role: str, network: str) -> list[float]:
    """The test accuracies in the published ``results.json``, one per seed; none without a clone of the repository."""
    clone = clone_folder()
    path = clone and clone / "book" / "published" / settings.name / "results.json"
    if path is None or not path.exists():
        return []
    runs = load_results(path)["runs"]
    return next((run["accuracy"] for run in runs if (run["role"], run["network"]) == (role, network)), [])
