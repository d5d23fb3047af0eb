"""The student leaves the notebook: ONNX files, smaller numbers, other runtimes, and predictions from the shell.

It needs onnx, onnxscript and onnxruntime, which the rest of kdlib does without: ``pip install 'kdlib[deploy]'``.
"""

from kdlib.deploy.export import OnnxModel, export_onnx
from kdlib.deploy.quantise import plain, quantise, rounded
from kdlib.deploy.saved import SavedNetwork, load_saved, published_student, reported_accuracy
from kdlib.deploy.timing import interleaved

__all__ = [
    "OnnxModel",
    "SavedNetwork",
    "export_onnx",
    "interleaved",
    "load_saved",
    "plain",
    "published_student",
    "quantise",
    "reported_accuracy",
    "rounded",
]
