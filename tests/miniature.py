"""The recipes for TinyImageNet and ImageNet end to end, on made-up trees of the true layout.

    python -m tests.miniature                  # 200 classes x 5 images, and 1,000 classes x 3
    python -m tests.miniature --classes 10     # what test_recipes_scale.py does

Every role of both recipes is played in little: the trees are decoded, a ResNet-50 teacher is trained for an epoch and
its soft labels are stored, and every student is trained alone and distilled. Then all of it is asked for again, and
must be found.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from kdlib.scale.recipes import RECIPES, ROLES, Outcome, distil


def tiny_imagenet(root: Path, classes: int = 200, images: int = 5) -> Path:
    """A tree as TinyImageNet's archive unpacks to, of noise; one validation and one test image per class."""
    random, names = np.random.RandomState(0), [f"n{k + 1443537:08d}" for k in range(classes)]
    lines = []
    for k, name in enumerate(names):
        for i in range(images):
            _draw(root / "train" / name / "images" / f"{name}_{i}.JPEG", random, 64, 64)
        boxes = "".join(f"{name}_{i}.JPEG\t0\t0\t63\t63\n" for i in range(images))
        (root / "train" / name / f"{name}_boxes.txt").write_text(boxes)
        _draw(root / "val" / "images" / f"val_{k}.JPEG", random, 64, 64)
        _draw(root / "test" / "images" / f"test_{k}.JPEG", random, 64, 64)
        lines.append(f"val_{k}.JPEG\t{name}\t0\t0\t63\t63\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("".join(f"{name}\n" for name in names))
    (root / "words.txt").write_text("".join(f"{name}\tthing {name}\n" for name in names))
    return root


def imagenet(root: Path, classes: int = 1000, images: int = 3) -> Path:
    """A tree as ImageNet is usually unpacked, of noise; one validation image per class, of all shapes, one in grey."""
    random = np.random.RandomState(0)
    for k in range(classes):
        name = f"n{k + 1440764:08d}"
        for i in range(images):
            _draw(root / "train" / name / f"{name}_{i}.JPEG", random, *random.randint(40, 90, 2))
        mode = "L" if k == 0 else "RGB"
        _draw(root / "val" / name / f"ILSVRC2012_val_{k + 1:08d}.JPEG", random, *random.randint(40, 90, 2), mode)
    return root


def _draw(path: Path, random: np.random.RandomState, height: int, width: int, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = random.randint(0, 256, (height // 4 + 1, width // 4 + 1, 3)).astype(np.uint8)
    Image.fromarray(pixels).resize((int(width), int(height))).convert(mode).save(path)


TREES = {"tiny_imagenet": tiny_imagenet, "imagenet": imagenet}


def play(recipe: str, root: Path, outputs: Path, students: list[str]) -> list[Outcome]:
    """Every role of a recipe in little."""
    options = dict(cache=outputs / "cache", workers=1, device="cpu", progress=False, miniature=True)
    made = [distil(recipe, root, outputs, role=role, **options) for role in ROLES[:2]]
    for student in students:
        made += [distil(recipe, root, outputs, role=role, student=student, **options) for role in ROLES[2:]]
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--classes", type=int, help="fewer than the data sets have")
    parser.add_argument("--recipe", choices=TREES, nargs="*", default=list(TREES))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "the teacher agrees with")  # it is hardly trained
    torch.set_num_threads(1)
    for recipe in options.recipe:
        with tempfile.TemporaryDirectory() as folder:
            root = TREES[recipe](Path(folder) / recipe, **({"classes": options.classes} if options.classes else {}))
            outputs, students = Path(folder) / "outputs", list(RECIPES[recipe].students)
            start = time.process_time()
            with contextlib.redirect_stdout(None):
                made = play(recipe, root, outputs, students)
            between = time.process_time()
            for one in made:
                size = sum(path.stat().st_size for path in (one.path, *one.path.rglob("*.npy")))
                print(f"  {one.role}: {one.path.name}, {size / 1e6:.1f} MB, {one.scores}")
            files = [path for ending in ("pth", "npy") for path in outputs.rglob(f"*.{ending}")]
            written = [path.stat().st_mtime_ns for path in files]
            with contextlib.redirect_stdout(None):
                again = play(recipe, root, outputs, students)
            assert again == made
            assert [path.stat().st_mtime_ns for path in files] == written
            last = time.process_time()
            print(f"{recipe}: {between - start:.0f} CPU seconds, and {last - between:.0f} to find all of it again")


if __name__ == "__main__":
    main()
