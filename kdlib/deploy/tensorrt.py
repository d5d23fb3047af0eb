"""NVIDIA's TensorRT 11, behind a check of what is missing. Nobody has run this file on a GPU yet: the chapter says so.

Since version 11 a network's types are those of its graph: an ONNX file in float16 gives an engine in float16, one with
QDQ pairs an engine in eight bits. The flags and calibrators of most older recipes are gone.
"""

from __future__ import annotations

import importlib.util

import numpy as np
import torch

from kdlib.deploy.export import INPUT, OUTPUT, OnnxModel

OLDEST = 11


def missing() -> str:
    """What this machine lacks for TensorRT, in words; empty if nothing."""
    if not torch.cuda.is_available():
        return "no CUDA GPU"
    if importlib.util.find_spec("tensorrt") is None:
        return "no tensorrt (pip install tensorrt)"
    import tensorrt

    found = int(tensorrt.__version__.partition(".")[0])
    return "" if found >= OLDEST else f"tensorrt {tensorrt.__version__}, older than {OLDEST}"


class TensorRTModel:
    """An engine for one GPU, made of an ONNX file for batches of 1 to `largest` images."""

    def __init__(self, model: OnnxModel, largest: int = 256):
        """Build the engine; it takes from seconds to minutes.

        Args:
            model: in float32 or float16, or in eight bits with ``quantise(..., symmetric=True)``.

        Raises:
            RuntimeError: something is missing, or TensorRT cannot parse or build the network; its log says why.
        """
        if lacking := missing():
            raise RuntimeError(f"TensorRT needs what this machine lacks: {lacking}")
        import tensorrt as trt

        logger = trt.Logger(trt.Logger.ERROR)
        builder = trt.Builder(logger)
        network = builder.create_network()
        parser = trt.OnnxParser(network, logger)
        if not parser.parse(model.path.read_bytes()):
            reasons = "; ".join(str(parser.get_error(k)) for k in range(parser.num_errors))
            raise RuntimeError(f"TensorRT cannot read {model.path}: {reasons}")
        sizes = builder.create_optimization_profile()
        sizes.set_shape(INPUT, (1, *model.shape), (largest, *model.shape), (largest, *model.shape))
        config = builder.create_builder_config()
        config.add_optimization_profile(sizes)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise RuntimeError(f"TensorRT cannot build an engine of {model.path}: its log says why")
        self.megabytes = plan.nbytes / 1e6
        self.classes, self.largest = len(model.class_names), largest
        self._engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
        self._context = self._engine.create_execution_context()
        self._stream = torch.cuda.Stream()

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits (B, classes) float32 of pixels (B, H, W, C) uint8 on the GPU; it waits for the result."""
        pixels = pixels.contiguous()
        logits = torch.empty(len(pixels), self.classes, device=pixels.device)
        self._context.set_input_shape(INPUT, tuple(pixels.shape))
        self._context.set_tensor_address(INPUT, pixels.data_ptr())
        self._context.set_tensor_address(OUTPUT, logits.data_ptr())
        self._stream.wait_stream(torch.cuda.current_stream())
        self._context.execute_async_v3(self._stream.cuda_stream)
        self._stream.synchronize()
        return logits

    def predict_logits(self, pixels: np.ndarray | torch.Tensor) -> torch.Tensor:
        """The same (N, classes) on the CPU of any number of images."""
        pixels = torch.as_tensor(pixels)
        return torch.cat([self(part.cuda()).cpu() for part in pixels.split(self.largest)])
