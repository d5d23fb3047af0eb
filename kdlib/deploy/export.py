"""A network as an ONNX file that takes pixels: it holds the normalisation, and what the outputs mean."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import os
import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from kdlib.data import ImageSet
from kdlib.evaluate import outputs_of
from kdlib.records import artefacts, identity

INPUT, OUTPUT = "images", "logits"


class FromPixels(nn.Module):
    """A network behind its normalisation: pixels (B, H, W, C) uint8 -> logits (B, classes) float32."""

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.network = network
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", -mean / std)

    def forward(self, pixels: Tensor) -> Tensor:
        images = pixels.to(self.scale.dtype).permute(0, 3, 1, 2)  # TensorRT wants uint8 cast before anything else
        return outputs_of(self.network(images * self.scale + self.shift)).float()


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike,
    images: ImageSet | Mapping,
    *,
    temperature: float = 1.0,
    half: bool = False,
    fingerprint: Mapping | None = None,
) -> OnnxModel:
    """Write a network as an ONNX file, and open it.

    The graph's input ``images`` is (batch, H, W, C) uint8 with any batch, its output ``logits`` (batch, classes)
    float32. The names of the classes, the temperature and the fingerprint are the file's metadata.

    Args:
        model: the plain network, such as :func:`kdlib.build` makes; it is left as it is.
        images: what the network was trained on, or its :attr:`~kdlib.data.ImageSet.format`.
        temperature: by which logits are divided before their softmax; for calibrated probabilities the one that
            :func:`kdlib.evaluate.fit_temperature` finds on validation images.
        half: weights and arithmetic in float16: half the size.
        fingerprint: what the network was made from; by default the digest of its weights.

    Raises:
        ValueError: a temperature that is not above 0, or a network that cannot be exported.
        OSError: the folder cannot be written.
    """
    path, about = Path(path), images.format if isinstance(images, ImageSet) else images
    if not (0 < temperature < float("inf")):
        raise ValueError(f"temperature is {temperature}: expected a number above 0")
    fingerprint = fingerprint or {"weights": identity.weights(model)}
    network = FromPixels(copy.deepcopy(model).cpu(), about["mean"], about["std"]).eval()
    network = network.half() if half else network.float()
    example = torch.zeros(2, *about["shape"], dtype=torch.uint8)  # of one image the exporter would fix the batch
    with torch.no_grad():
        outputs = tuple(network(example).shape)
    if outputs != (2, len(about["class_names"])):
        raise ValueError(
            f"the network gives {outputs} for 2 images, expected (2, {len(about['class_names'])}): one logit for each "
            f"of {', '.join(about['class_names'][:6])}"
        )
    program = _exported(network, example)
    program.model.metadata_props.update(
        class_names=json.dumps(list(about["class_names"]), ensure_ascii=False),
        temperature=repr(float(temperature)),
        fingerprint=json.dumps(fingerprint, sort_keys=True),
    )
    with artefacts.atomic_write(path) as partial:
        program.save(str(partial), external_data=False)
    return OnnxModel(path)


def _exported(network: nn.Module, example: Tensor):
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # of parts of PyTorch that it calls itself
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)
            return torch.onnx.export(
                network,
                (example,),
                dynamo=True,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
    except ImportError as error:
        raise ValueError(
            f"exporting needs {error.name}, which is not installed: pip install 'kdlib[deploy]'"
        ) from error
    except torch.onnx.OnnxExporterError as error:
        raise ValueError(
            f"{type(network.network).__name__} cannot be exported ({artefacts.short_reason(error)}): its forward must "
            "be made of tensor operations that do not depend on the values in them"
        ) from error


class OnnxModel:
    """An ONNX file, and what its metadata say. It runs with ONNX Runtime on the CPU."""

    def __init__(self, path: str | os.PathLike, threads: int | None = None):
        """Open a file that :func:`export_onnx` or :func:`~kdlib.deploy.quantise` wrote.

        Args:
            threads: of ONNX Runtime; None: as many as there are cores.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that ONNX Runtime cannot open, or of another interface.
        """
        self.path, self.threads = Path(path), threads
        if not self.path.is_file():
            raise FileNotFoundError(f"{path} is not there: export a network first, such as with python -m kdlib export")
        told = self.session.get_modelmeta().custom_metadata_map
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        if [one.name for one in inputs] != [INPUT] or [one.name for one in outputs] != [OUTPUT] or not told:
            raise ValueError(
                f"{path} has the inputs {[one.name for one in inputs]} and outputs {[one.name for one in outputs]}, "
                f"expected [{INPUT!r}] and [{OUTPUT!r}] with metadata, as kdlib.deploy.export_onnx writes them"
            )
        self.shape = tuple(inputs[0].shape[1:])  # (H, W, C)
        try:
            self.class_names = tuple(json.loads(told["class_names"]))
            self.temperature = float(told["temperature"])
            self.fingerprint = json.loads(told["fingerprint"])
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} has damaged metadata ({artefacts.short_reason(error)[:200]}): export it again"
            ) from error

    @cached_property
    def session(self):
        """ONNX Runtime's session on the CPU."""
        try:
            import onnxruntime
        except ImportError as error:
            raise ValueError("onnxruntime is not installed: pip install 'kdlib[deploy]'") from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only
        # idle threads would go on spinning for a while, and take the cores from whatever runs beside it
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if self.threads:
            options.intra_op_num_threads = self.threads
        try:
            return onnxruntime.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its own classes, one per status
            raise ValueError(
                f"{self.path} is not a network that ONNX Runtime can open ({artefacts.short_reason(error)}): export it "
                "again"
            ) from error

    @property
    def megabytes(self) -> float:
        """The size of the file, 10**6 bytes."""
        return self.path.stat().st_size / 1e6

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Logits (B, classes) float32 of pixels (B, H, W, C) uint8."""
        return self.session.run([OUTPUT], {INPUT: pixels})[0]

    def predict_logits(self, pixels: np.ndarray | Tensor, batch_size: int = 256) -> Tensor:
        """The same (N, classes) of any number of images (N, H, W, C) uint8, such as ``data.test.images``."""
        pixels = np.asarray(pixels)
        if pixels.dtype != np.uint8 or pixels.shape[1:] != self.shape:
            raise ValueError(
                f"images are {pixels.dtype} {pixels.shape}, expected uint8 (N, {', '.join(map(str, self.shape))}): "
                "pixels from 0 to 255, which the graph itself normalises"
            )
        parts = [self(pixels[start : start + batch_size]) for start in range(0, len(pixels), batch_size)]
        return torch.from_numpy(np.concatenate(parts))
