"""What a reader can touch on the pages: its data, and the student that runs in the browser.

    python tools/live.py data      # writes book/_static/live/: recorded logits, the network of the digit pad (3 min)

The data files are committed. ``tools/render.py`` calls :func:`install` after each build: it adds the student as an ONNX
file and ONNX Runtime Web to the site. Without npm or a network the site lacks these two, and its pages say so.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from notebooks import BOOK, RUNS
from PIL import Image
from torch import Tensor, nn

import kdlib
from kdlib import evaluate, plots, published
from kdlib.records import artefacts
from kdlib.soft_labels import generate
from kdlib.sources.splits import Part

FOLDER = BOOK / "_static" / "live"
STUDENT = BOOK / "published" / "full" / "student_cnn.pth"
DIGIT = 3  # the one that the network of the digit pad has never seen
RUNTIME = "onnxruntime-web@1.30.0"
FILES = {  # of its package's dist/: the loader and the program, with one thread and without WebGPU
    "ort.wasm.bundle.min.mjs": "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
CACHE = RUNS / "live"


# --- data: what is committed ---------------------------------------------------------------------------------------


def data() -> None:
    """Write the data files and the pictures that stand in for them where there is no JavaScript."""
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    write("cifar10", recorded_logits())
    write("digits", digit_network())


def write(name: str, content: dict) -> None:
    """``<name>.js``, a script, since pages that are opened as files may load scripts but fetch nothing."""
    text = json.dumps(content, separators=(",", ":"))
    path = FOLDER / f"{name}.js"
    path.write_text(f"// Written by tools/live.py.\nlive.{name} = {text};\n", encoding="utf-8")
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


def read(name: str) -> dict:
    """What :func:`write` wrote."""
    text = (FOLDER / f"{name}.js").read_text(encoding="utf-8")
    return json.loads(text.partition(" = ")[2].removesuffix(";\n"))


def recorded_logits() -> dict:
    """Thirty test images of CIFAR-10 with the logits of the published teacher and of its student.

    They are of each class the first two in canonical order that the student classifies correctly, and the first that it
    does not.
    """
    settings = kdlib.resolve("full")
    images = kdlib.load_data(settings.dataset)
    teacher = published.recorded_logits(settings, images)[settings.file("teacher")]["test"]
    student = evaluate.predict_logits(student_model(len(images.test.class_names)), images.test, device="cpu")
    labels, names = images.test.labels, images.test.class_names
    correct = student.argmax(1) == labels

    def kth(rows: Tensor, k: int) -> list[int]:
        """Of each class the k-th image among `rows`, a mask."""
        return [int((rows & (labels == c)).nonzero()[k]) for c in range(len(names))]

    rows = [*kth(correct, 0), *kth(correct, 1), *kth(~correct, 0)]
    pixels = images.test.images[rows]
    cats = [k for k, row in enumerate(rows) if names[labels[row]] == "cat"]
    picture_of_temperatures(pixels[cats[::2]], teacher[rows][cats[::2]], names)
    return {
        "class_names": names,
        "mean": images.test.mean,
        "std": images.test.std,
        "shape": list(images.test.images.shape[1:]),
        "rows": rows,
        "labels": labels[rows].tolist(),
        "teacher": rounded(teacher[rows]),
        "student": rounded(student[rows]),
        "columns": len(names),
        "pictures": "data:image/png;base64," + base64.b64encode(sprite(pixels.numpy())).decode(),
    }


def student_model(classes: int) -> nn.Module:
    """The published student, in eval mode."""
    return artefacts.load_weights(STUDENT, kdlib.build("cnn", classes)).eval()


def rounded(values: Tensor, digits: int = 3) -> list:
    return np.round(values.double().numpy(), digits).tolist()


def sprite(pixels: np.ndarray, columns: int = 10) -> bytes:
    """Images (N, H, W, C) as one PNG, row by row."""
    count, height, width, channels = pixels.shape
    grid = pixels.reshape(count // columns, columns, height, width, channels).swapaxes(1, 2)
    file = io.BytesIO()
    Image.fromarray(grid.reshape(-1, columns * width, channels)).save(file, "PNG", optimize=True)
    return file.getvalue()


def picture_of_temperatures(pixels: Tensor, logits: Tensor, names: tuple[str, ...]) -> None:
    """For readers without JavaScript: the teacher's probabilities for some images at three temperatures."""
    softened = {f"T = {t}": (logits / t).softmax(1).numpy() for t in (1, 4, 20)}
    save(plots.soft_targets(pixels, softened, names), "temperature.png")


def save(figure: plots.Figure, name: str) -> None:
    figure.savefig(FOLDER / name, dpi=160, metadata={"Software": None})
    with Image.open(FOLDER / name) as picture:
        few = picture.convert("RGB").quantize(128)  # a quarter of the size, and nobody sees it
    few.save(FOLDER / name, optimize=True)


# --- the digit pad -------------------------------------------------------------------------------------------------


def digit_network() -> dict:
    """A perceptron that learned MNIST from a teacher's soft labels of every digit but one, in 8 bits.

    As in chapter 07 the teacher has seen all ten digits, the student is given no label, and the number that is added to
    the missing digit's logit comes from its share of all digits, on validation images, without a label. Unlike there,
    the student sees shifted images, since nobody draws a digit exactly in the middle.
    """
    train, validation, test = kdlib.load_data("mnist", limit=Part(20_000))
    recipe = kdlib.Recipe(epochs=6, batch_size=50, learning_rate=0.05)
    teacher = kdlib.build("lenet", train.classes, train.channels)
    kdlib.train(teacher, train, F.cross_entropy, recipe, device="cpu")
    kept = train.labels != DIGIT
    shown = replace(train, images=train.images[kept], labels=train.labels[kept])
    soft_labels = kdlib.SoftLabels(torch.from_numpy(generate(teacher, shown, 8, device="cpu")), shown.identity)
    student = kdlib.build("mlp100", train.classes, train.channels)
    loss_fn = partial(kdlib.distillation_loss, temperature=20.0, alpha=0.0)
    recipe = kdlib.Recipe(epochs=40, batch_size=100, learning_rate=0.05, weight_decay=0.0, views=8)
    kdlib.train(student, shown, loss_fn, recipe, targets=soft_labels, device="cpu")

    layers = [in_8_bits(layer) for layer in student.layers if isinstance(layer, nn.Linear)]
    on_validation, on_test = (evaluate.predict_logits(student, split, device="cpu") for split in (validation, test))
    others = [c for c in range(train.classes) if c != DIGIT]
    margin = on_validation[:, others].amax(1) - on_validation[:, DIGIT]
    b = round(margin.quantile(1 / train.classes).item(), 2)
    raised = on_test + b * F.one_hot(torch.tensor(DIGIT), train.classes)
    labels = test.labels
    samples = [int((labels == c).nonzero()[k]) for c in range(train.classes) for k in range(5 if c == DIGIT else 1)]
    picture_of_digits(test.images, labels, on_test.argmax(1), raised.argmax(1))
    return {
        "digit": DIGIT,
        "bias": b,
        "mean": train.mean[0],
        "std": train.std[0],
        "layers": layers,
        "test": [measured(on_test.argmax(1), labels), measured(raised.argmax(1), labels)],
        "samples": base64.b64encode(test.images[samples].numpy().tobytes()).decode(),
        "labels": labels[samples].tolist(),
        "rows": samples,
    }


@torch.no_grad()
def in_8_bits(layer: nn.Linear) -> dict:
    """A layer's weights as whole numbers from -127 to 127 with a scale per output; the layer takes on what they say."""
    scale = np.round(layer.weight.abs().amax(1).double().numpy() / 127, 7)
    whole = np.round(layer.weight.double().numpy() / scale[:, None]).clip(-127, 127).astype(np.int8)
    bias = np.round(layer.bias.double().numpy(), 5)
    layer.weight.copy_(torch.from_numpy(whole * scale[:, None]))
    layer.bias.copy_(torch.from_numpy(bias))
    return {"weights": base64.b64encode(whole.tobytes()).decode(), "scale": scale.tolist(), "bias": bias.tolist()}


def measured(predicted: Tensor, labels: Tensor) -> dict:
    """Shares of the test images that are classified correctly: of the missing digit, and of all."""
    correct = (predicted == labels).double()
    return {"digit": round(correct[labels == DIGIT].mean().item(), 4), "all": round(correct.mean().item(), 4)}


def picture_of_digits(images: Tensor, labels: Tensor, before: Tensor, after: Tensor) -> None:
    """For readers without JavaScript: the first test images of the missing digit, and what the network calls them."""
    chosen = (labels == DIGIT).nonzero().flatten()[:10]
    titles = [f"{before[i]} → {after[i]}" for i in chosen]
    save(plots.image_grid(images[chosen], titles), "digits.png")


# --- the student in the browser: what a build adds ------------------------------------------------------------------


def install(html: Path) -> None:
    """Put the student and ONNX Runtime Web into a built site; a printed line says why if that is not possible."""
    place = html / "_static" / "live"
    if not (place / "runtime.js").exists():  # a book without pages that a reader can touch
        return
    try:
        files = [student_onnx(), *runtime()]
    except (OSError, ValueError, ImportError, subprocess.SubprocessError) as error:
        print(f"the site has no student that runs in the browser: {artefacts.short_reason(error)}")
        return
    for file in files:
        shutil.copy(file, place)
    about = {"version": RUNTIME, "bytes": sum(file.stat().st_size for file in files)}
    (place / "runtime.js").write_text(f"live.runtime = {json.dumps(about)};\n", encoding="utf-8")


def student_onnx() -> Path:
    """The published student as an ONNX file, exported once for these weights."""
    path = CACHE / hashlib.sha256(STUDENT.read_bytes()).hexdigest()[:8] / "student_cnn.onnx"
    if not path.exists():
        from kdlib.deploy import export_onnx

        path.parent.mkdir(parents=True, exist_ok=True)
        images = read("cifar10")
        export_onnx(student_model(len(images["class_names"])), path, images)
    return path


def runtime() -> list[Path]:
    """The files of ONNX Runtime Web, fetched once by npm and compared with the digests above."""
    folder = CACHE / RUNTIME
    if not all((folder / name).exists() for name in FILES):
        if not (npm := shutil.which("npm")):
            raise OSError("npm is not there, which fetches ONNX Runtime Web")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as packed:
            command = [npm, "pack", RUNTIME, "--silent", "--fetch-retries=0", "--fetch-timeout=60000"]
            done = subprocess.run(command, cwd=packed, capture_output=True, text=True, timeout=300)
            if done.returncode:
                raise OSError(f"npm cannot fetch {RUNTIME}")
            with tarfile.open(next(Path(packed).glob("*.tgz"))) as archive:
                for name, digest in FILES.items():
                    content = archive.extractfile(f"package/dist/{name}").read()
                    if hashlib.sha256(content).hexdigest() != digest:
                        raise OSError(f"{name} of {RUNTIME} is not the file that this book was tested with")
                    with artefacts.atomic_write(folder / name) as written:
                        written.write_bytes(content)
    return [folder / name for name in FILES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="command")
    commands.add_parser("data", help=data.__doc__.splitlines()[0]).set_defaults(action=data)
    parser.parse_args().action()


if __name__ == "__main__":
    main()
