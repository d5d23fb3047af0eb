"""Training on images that are larger than the memory allowed for them: under a limit that the system enforces.

    python -m tests.larger                                  # 3 GB of images within 300 MB; half a minute per GB
    python -m tests.larger --megabytes 300 --limit 30       # what test_stream.py does
    python -m tests.larger --in-memory                      # the same images in memory: fails, as it should

The process first does everything once on a few images, so that libraries are loaded. Then its data segment
(RLIMIT_DATA: all that is private and can be written) may grow by `limit` only, while the images are decoded, kept,
trained on for an epoch, and their logits predicted. It prints how far the anonymous resident memory (RssAnon) grew.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import resource
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlib import Recipe, predict_logits, train
from kdlib.data import ImageSet
from kdlib.scale import SeededViews, StreamedImages
from kdlib.scale.stream_cache import cache_images

SIZE, VIEW, CLASSES = 128, 16, 10


class Drawn:
    """A source of pictures that are computed when they are asked for."""

    class_names = tuple(map(str, range(CLASSES)))

    def __init__(self, count: int):
        self.labels = np.arange(count) % CLASSES
        self.identity = f"{count} drawn"

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int, size: int) -> np.ndarray:
        """A picture (size, size, 3) uint8 whose brightness tells its class, and that is no other's."""
        rows = np.arange(size * size * 3, dtype=np.uint32).reshape(size, size, 3)
        return (((rows * (index + 7)) >> 5) % 100 + 15 * self.labels[index]).astype(np.uint8)


def small(classes: int, channels: int = 3) -> nn.Module:
    """A network that costs little beside the reading."""
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(channels * 16, classes))


def kilobytes(name: str) -> int:
    """A line of what the system says of this process's memory."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1])


def measured(student_logits: Tensor, labels: Tensor, *, seen: list) -> Tensor:
    """The cross-entropy; on the way, how much memory is used."""
    seen.append(kilobytes("RssAnon"))
    return F.cross_entropy(student_logits, labels)


def run(folder: Path, count: int, workers: int, in_memory: bool, seen: list) -> None:
    """Decode and keep that many images, train on them, and predict."""
    source = Drawn(count)
    images = cache_images(source, folder / f"{count}.npy", SIZE, progress=False)
    labels, names = torch.from_numpy(source.labels), source.class_names
    shared = dict(labels=labels, class_names=names, mean=(0.5,) * 3, std=(0.2,) * 3)
    if in_memory:
        data = ImageSet("drawn/train", images[:], **shared)
    else:
        data = StreamedImages("drawn/train", images, **shared, views=SeededViews(VIEW), workers=workers)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(16), small(CLASSES)) if in_memory else small(CLASSES)
    train(model, data, partial(measured, seen=seen), Recipe(1, 32, 0.01), progress=False, device="cpu")
    predict_logits(model, data, batch_size=64, device="cpu")
    seen.append(kilobytes("RssAnon"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=3000, help="of images")
    parser.add_argument("--limit", type=int, default=300, help="megabytes by which the process may grow")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--in-memory", action="store_true")
    parser.add_argument("--folder", type=Path, help="for the kept images; a temporary one by default")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    count = options.megabytes * 10**6 // (SIZE * SIZE * 3)
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        run(folder, 130, options.workers, options.in_memory, [])
        before, data = kilobytes("RssAnon"), kilobytes("VmData") * 1024
        most = data + options.limit * 10**6
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
        seen: list[int] = []
        run(folder, count, options.workers, options.in_memory, seen)
    figures = {
        "images_mb": count * SIZE * SIZE * 3 / 1e6,
        "grown_mb": (max(seen) - before) / 1e6 * 1024,  # the reading included
        "grown_while_training_mb": (max(seen) - seen[0]) / 1e6 * 1024,
    }
    figures = {name: round(value, 1) for name, value in figures.items()}
    print(json.dumps(figures))
    if not options.in_memory and options.folder is None:  # no test, which would be a short form
        from tests.campaigns import record  # not above: a test runs this file by its path

        record("larger", figures | {"limit_mb": options.limit}, time.perf_counter() - start)


if __name__ == "__main__":
    main()
