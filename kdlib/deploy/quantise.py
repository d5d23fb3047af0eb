"""Eight bits: static quantisation with ONNX Runtime, and training a student that knows that it will be rounded."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.nn.utils import parametrize

from kdlib.data import ImageSet
from kdlib.deploy.export import INPUT, OnnxModel
from kdlib.records import artefacts

ROUNDED = (nn.Conv2d, nn.Linear)  # the layers whose weights and inputs get eight bits


def quantise(
    model: OnnxModel, path: str | os.PathLike, images: Tensor, *, symmetric: bool = False, batch_size: int = 100
) -> OnnxModel:
    """Write an ONNX file in which weights and inputs of convolutions and linear layers have eight bits, and open it.

    So have the outputs of convolutions; those of linear layers, such as the logits, stay floats. Weights get a scale
    for each output channel, inputs one for the whole tensor, from the range that they take on `images`. The graph holds
    pairs of QuantizeLinear and DequantizeLinear (QDQ), which a runtime joins to integer arithmetic.

    Args:
        model: in float32.
        images: of the training set, (N, H, W, C) uint8; some hundred are enough.
        symmetric: inputs as signed numbers around zero, as TensorRT wants them; after a ReLU this wastes one bit.
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Batches(quantization.CalibrationDataReader):
        def __init__(self):
            self.parts = iter(np.asarray(images[k : k + batch_size]) for k in range(0, len(images), batch_size))

        def get_next(self):
            part = next(self.parts, None)
            return None if part is None else {INPUT: part}

    path, log = Path(path), logging.getLogger()
    level = log.level
    log.setLevel(logging.ERROR)  # it advises to prepare the graph even after that was done
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            prepared = Path(folder) / "prepared.onnx"
            quant_pre_process(str(model.path), str(prepared), skip_symbolic_shape=True)  # which older versions fail at
            with artefacts.atomic_write(path) as partial:
                quantization.quantize_static(
                    str(prepared),
                    str(partial),
                    Batches(),
                    quant_format=quantization.QuantFormat.QDQ,
                    per_channel=True,
                    activation_type=quantization.QuantType.QInt8 if symmetric else quantization.QuantType.QUInt8,
                    weight_type=quantization.QuantType.QInt8,
                    op_types_to_quantize=["Conv", "Gemm", "MatMul"],
                    extra_options={
                        "ActivationSymmetric": symmetric,
                        "OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"],  # such as the logits
                    },
                )
    finally:
        log.setLevel(level)
    return OnnxModel(path, model.threads)


class RoundedWeight(nn.Module):
    """Weights rounded to 255 levels for each output channel; their gradient passes as if they were not."""

    def forward(self, weight: Tensor) -> Tensor:
        largest = weight.detach().abs().flatten(1).amax(1).clamp(min=1e-8)
        zero = torch.zeros(len(weight), dtype=torch.int32, device=weight.device)
        return torch.fake_quantize_per_channel_affine(weight, largest / 127, zero, 0, -127, 127)


@torch.no_grad()
def rounded(model: nn.Module, data: ImageSet, images: int = 200) -> nn.Module:
    """A copy of a network that rounds as eight bits will, to be trained further (Jacob et al., arXiv 1712.05877).

    Batch norm is folded into the convolutions first, as the exporter does, so that the same weights are rounded.
    """
    network = fuse(copy.deepcopy(model).cpu().eval())
    layers = [layer for layer in network.modules() if isinstance(layer, ROUNDED)]
    ranges = {layer: [0.0, 0.0] for layer in layers}

    def watch(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        low, high = ranges[layer]
        ranges[layer] = [min(low, inputs[0].min().item()), max(high, inputs[0].max().item())]

    watching = [layer.register_forward_pre_hook(watch) for layer in layers]
    rows = torch.arange(min(images, len(data)))
    network(data.to("cpu").batch(rows, torch.zeros_like(rows)))
    for one in watching:
        one.remove()
    for layer, (low, high) in ranges.items():
        scale = max(high - low, 1e-8) / 255
        zero = round(-low / scale)

        def round_input(layer: nn.Module, inputs: tuple[Tensor], scale=scale, zero=zero) -> tuple[Tensor]:
            return (torch.fake_quantize_per_tensor_affine(inputs[0], scale, zero, 0, 255),)

        layer.register_forward_pre_hook(round_input)
        parametrize.register_parametrization(layer, "weight", RoundedWeight())
    return network.requires_grad_(True)


def plain(network: nn.Module) -> nn.Module:
    """Take the rounding out of a network that :func:`rounded` made, in place: it will be exported, and then rounded."""
    for layer in network.modules():
        if isinstance(layer, ROUNDED):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
            layer._forward_pre_hooks.clear()
    return network
