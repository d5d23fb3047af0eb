"""Eight bits: static quantisation with ONNX Runtime, calibrated on training images."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
from pathlib import Path

import numpy as np
from torch import Tensor

from kdlib.deploy.export import INPUT, OnnxModel
from kdlib.records import artefacts


def quantise(model: OnnxModel, path: str | os.PathLike, images: Tensor, *, batch_size: int = 100) -> OnnxModel:
    """Write an ONNX file in which weights and activations of convolutions and linear layers have eight bits; open it.

    Weights get a scale per output channel, activations one per tensor, from the range that they take on `images`. The
    graph holds pairs of QuantizeLinear and DequantizeLinear (QDQ), which a runtime joins to integer arithmetic.

    Args:
        model: in float32.
        images: of the training set, (N, H, W, C) uint8; some hundred are enough.
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Batches(quantization.CalibrationDataReader):
        def __init__(self):
            self.parts = iter(np.asarray(images[k : k + batch_size]) for k in range(0, len(images), batch_size))

        def get_next(self):
            part = next(self.parts, None)
            return None if part is None else {INPUT: part}

    path = Path(path)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        prepared = Path(folder) / "prepared.onnx"
        logging.getLogger().setLevel(logging.ERROR)  # it advises the preparation even after it was done
        quant_pre_process(str(model.path), str(prepared))
        with artefacts.atomic_write(path) as partial:
            quantization.quantize_static(
                str(prepared),
                str(partial),
                Batches(),
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
                op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            )
    return OnnxModel(path, model.threads)
