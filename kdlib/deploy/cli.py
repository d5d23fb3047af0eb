"""``python -m kdlib``: train, from weights to an ONNX file, and from a picture to its classes, without a notebook."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from kdlib.deploy.export import export_onnx
from kdlib.deploy.saved import load_saved, predict
from kdlib.scale.cli import add_command


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 1 with a message on standard error if a file or a value is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m kdlib", description="Train networks, export them, and predict with them."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--network", help="of the weights, package.module:function, if it is your own")
    shared.add_argument("--dataset", help="that the weights were trained on, if their record does not describe it")
    shared.add_argument("--temperature", type=float, help="by which logits are divided before the softmax")

    export = commands.add_parser("export", parents=[shared], help="write an ONNX file of a file of weights")
    export.add_argument("weights", type=Path, help="such as outputs/full/student_cnn.pth, with its record beside it")
    export.add_argument("onnx", type=Path, help="the file to write, such as student.onnx")
    export.add_argument("--half", action="store_true", help="in float16: half the size")
    export.set_defaults(run=_export)

    predict_command = commands.add_parser("predict", parents=[shared], help="name the classes of pictures")
    predict_command.add_argument("file", type=Path, help="a network, .onnx or .pth")
    predict_command.add_argument("pictures", type=Path, nargs="+")
    predict_command.add_argument("--top", type=int, default=3, help="how many classes of each (3)")
    predict_command.set_defaults(run=_predict)

    add_command(commands)

    options = parser.parse_args(arguments)
    sys.path.insert(0, "")  # so that a network of the reader's own is found in the working folder
    try:
        options.run(options)
    except (OSError, ValueError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _export(options: argparse.Namespace) -> None:
    saved = load_saved(options.weights, network=options.network, dataset=options.dataset)
    temperature = 1.0 if options.temperature is None else options.temperature
    model = export_onnx(
        saved.model,
        options.onnx,
        saved.format,
        temperature=temperature,
        half=options.half,
        fingerprint=saved.fingerprint,
    )
    height, width, channels = model.shape
    print(
        f"{model.path}: {model.megabytes:.2f} MB; takes images of {width}x{height} pixels with {channels} "
        f"channel{'s' if channels > 1 else ''} as uint8 (batch, {height}, {width}, {channels}), gives logits for "
        f"{len(model.class_names)} classes, temperature {model.temperature:g}"
    )


def _predict(options: argparse.Namespace) -> None:
    if options.top < 1:
        raise ValueError(f"--top is {options.top}: expected at least 1")
    named = {"network": options.network, "dataset": options.dataset}
    probabilities, names = predict(options.file, options.pictures, temperature=options.temperature, **named)
    for picture, own in zip(options.pictures, probabilities, strict=True):
        best = torch.topk(own, min(options.top, len(names)))
        said = ", ".join(
            f"{names[k]} {p:.1%}" for p, k in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        )
        print(f"{picture}: {said}")
