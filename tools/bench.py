"""How fast the book's code is, and against what: four cases, each beside the loop that most tutorials use.

    python tools/bench.py                  # a table, and outputs/bench-<device>.json
    python tools/bench.py --publish        # and the page of the book with it

On a GPU the cases are those of profile full (ResNet-50, CIFAR-10's size), on a CPU small ones. The images are noise:
what they show changes nothing about how long they take.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

import kdlib
from kdlib import artefacts, data, plots, profiles, soft_labels
from kdlib.models import half_precision, pick_device

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "book" / "speed.md"
PUBLISHED = ROOT / "book" / "published"
TEACHER, SOFT_LABELS, STUDENT, LIVE = (
    "train the teacher",
    "generate soft labels",
    "train a student from soft labels",
    "train a student with the live teacher",
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the cases are measured on."""

    images: int  # in the training set
    size: int  # pixels, height and width
    channels: int
    padding: int  # pixels
    teacher: str
    students: tuple[str, ...]
    batch_size: int
    epochs: int  # timed, after one that is not; as many views are answered, so no more than there are
    matrix: int  # rows of the square matrices whose product tells what the device can do
    workers: tuple[int, ...]  # of the tutorial's DataLoader; the best is taken
    tutorial_share: float  # of the images that the tutorial's loop is timed on


def setting(device: torch.device) -> Setting:
    """Profile full's size on a GPU; on a CPU one that takes seconds."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if device.type == "cuda":
        workers = tuple(n for n in (8, 16) if n <= cores) or (cores,)
        return Setting(50_000, 32, 3, 4, "resnet50", ("cnn", "wide_resnet14"), 512, 3, 8192, workers, 0.2)
    return Setting(1_000, 8, 1, 1, "digits_cnn", ("tiny_cnn",), 50, 9, 1024, (0, cores), 1.0)


def cases(s: Setting) -> list[tuple[str, str]]:
    """What is measured, each with the network that it is about."""
    return [(TEACHER, s.teacher), (SOFT_LABELS, s.teacher)] + [(c, n) for c in (STUDENT, LIVE) for n in s.students]


def noise(s: Setting, count: int) -> data.ImageSet:
    """Images of that size and number, of ten classes."""
    random = np.random.default_rng(0)
    return data.ImageSet(
        name=f"noise{count}/train",
        images=torch.from_numpy(random.integers(0, 256, (count, s.size, s.size, s.channels), dtype=np.uint8)),
        labels=torch.from_numpy(random.integers(0, 10, count)),
        class_names=tuple(map(str, range(10))),
        mean=(0.5,) * s.channels,
        std=(0.25,) * s.channels,
        padding=s.padding,
        flip=s.channels == 3,
    )


# --- what is measured ----------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    """Wait for what was queued; without this a GPU's time is that of the queueing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """The median time of one call."""
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def matrix_flops(rows: int, device: torch.device) -> float:
    """Floating-point operations a second that a large matrix product reaches, in the precision that training uses."""
    dtype = half_precision(device) or torch.float32
    a, b = (torch.randn(rows, rows, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    return 2 * rows**3 / seconds(lambda: a @ b, device, 10)


def forward_flops(network: str, s: Setting) -> float:
    """Floating-point operations of one image's way through the network, multiplications and additions counted each."""
    model = kdlib.build(network, 10, s.channels).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, s.channels, s.size, s.size))
    return counter.get_total_flops()


def kdlib_epochs(case: str, network: str, s: Setting, count: int, device: torch.device) -> tuple[float, float]:
    """Seconds before the first timed epoch (compilation, warm-up), and seconds an epoch, with kdlib."""
    images = noise(s, count)
    teacher = kdlib.build(s.teacher, 10, s.channels).to(device).eval()
    if case == SOFT_LABELS:
        first = seconds(lambda: soft_labels.generate(teacher, images, 1, device=device, progress=False), device)
        again = seconds(lambda: soft_labels.generate(teacher, images, s.epochs, device=device, progress=False), device)
        return first, again / s.epochs
    loss_fn = kdlib.CrossEntropy()
    if case == STUDENT:
        logits = soft_labels.generate(teacher, images, 2, device=device, progress=False)
        made = {"data": f"{images.name} {images.fingerprint}"}
        loss_fn = kdlib.Distillation(kdlib.SoftLabels(torch.from_numpy(logits), made), 4.0, 0.1)
    elif case == LIVE:
        loss_fn = kdlib.Distillation(kdlib.LiveTeacher(teacher, {}), 4.0, 0.1)
    model = kdlib.build(network, 10, s.channels)
    views = 2 if case == STUDENT else None
    recipe = kdlib.Recipe(1 + s.epochs, s.batch_size, 0.05, views=views)
    history = kdlib.train(model, images, loss_fn, recipe, device=device, progress=False)
    return history.seconds[0], float(np.median(np.diff(history.seconds)))


# --- the loop that most tutorials use ------------------------------------------------------------------------------


class Pictures(Dataset):
    """Images as tutorials have them: PIL pictures that go through torchvision's transforms, one by one."""

    def __init__(self, images: data.ImageSet, augment: bool):
        self.pixels, self.labels, s = images.images.numpy(), images.labels.numpy(), images
        steps = [transforms.RandomCrop(s.images.shape[1:3], padding=s.padding)] if augment else []
        steps += [transforms.RandomHorizontalFlip()] if augment and s.flip else []
        self.transform = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(s.mean, s.std)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
        pixels = self.pixels[index]
        picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        return self.transform(picture), int(self.labels[index]), index


def tutorial_epoch(case: str, network: str, s: Setting, count: int, device: torch.device, workers: int) -> float:
    """Seconds an epoch of the same work, as most tutorials write it.

    float32 with TF32 as PyTorch sets it, cuDNN's autotuning on, `.item()` in every step; the student's teacher answers
    live, or its answers are looked up by the image's index.
    """
    images = noise(s, count)
    loader = DataLoader(
        Pictures(images, augment=case != SOFT_LABELS),
        batch_size=s.batch_size,
        shuffle=case != SOFT_LABELS,
        drop_last=case != SOFT_LABELS,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )
    teacher = kdlib.build(s.teacher, 10, s.channels).to(device).eval()
    model = kdlib.build(network, 10, s.channels).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    looked_up = torch.randn(len(images), 10, device=device)

    def generate() -> None:
        with torch.no_grad():
            for pictures, _, _ in loader:
                teacher(pictures.to(device, non_blocking=True)).cpu()

    def epoch() -> None:
        model.train()
        total = 0.0
        for pictures, labels, indices in loader:
            pictures, labels = pictures.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            logits = model(pictures)
            loss = F.cross_entropy(logits, labels)
            if case != TEACHER:
                with torch.no_grad():
                    answers = teacher(pictures) if case == LIVE else looked_up[indices.to(device)]
                soft = F.kl_div(F.log_softmax(logits / 4, 1), F.softmax(answers / 4, 1), reduction="batchmean")
                loss = 0.1 * loss + 0.9 * 16 * soft
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()

    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        work = generate if case == SOFT_LABELS else epoch
        work()  # starts the workers, and lets cuDNN choose
        return seconds(work, device)
    finally:
        torch.backends.cudnn.benchmark = before


# --- the table -----------------------------------------------------------------------------------------------------


def measure(case: str, network: str, s: Setting, device: torch.device, peak: float) -> dict:
    """One case: kdlib's epoch, the tutorial's, and how the cost grows with the number of images."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    first, epoch = kdlib_epochs(case, network, s, s.images, device)
    memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    growth = {count: kdlib_epochs(case, network, s, count, device)[1] for count in (s.images // 4, s.images // 2)}
    growth[s.images] = epoch
    count = int(s.images * s.tutorial_share)
    tutorial = {w: tutorial_epoch(case, network, s, count, device, w) * s.images / count for w in s.workers}
    best = min(tutorial, key=tutorial.get)
    # backwards costs about twice what forwards does
    work = forward_flops(network, s) * (1 if case == SOFT_LABELS else 3)
    work += forward_flops(s.teacher, s) if case == LIVE else 0
    flops = work * s.images / epoch
    return {
        "case": case,
        "network": network,
        "images": s.images,
        "batch_size": s.batch_size,
        "seconds_before": first,
        "seconds_an_epoch": epoch,
        "images_a_second": s.images / epoch,
        "tflops": flops / 1e12,
        "share_of_matrix_product": flops / peak,
        "peak_memory_gb": memory,
        "seconds_by_images": {str(k): v for k, v in growth.items()},
        "tutorial_seconds_an_epoch": tutorial[best],
        "tutorial_workers": best,
        "times_as_fast": tutorial[best] / epoch,
    }


def rows(found: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of times."""
    header = ["case", "network", "images/s", "s an epoch", "tutorial loop, s", "times as fast"]
    lines = []
    for r in found["cases"]:
        workers = f"{r['tutorial_workers']} worker{'' if r['tutorial_workers'] == 1 else 's'}"
        lines.append(
            [
                r["case"],
                r["network"],
                f"{r['images_a_second']:,.0f}",
                f"{r['seconds_an_epoch']:.3g}",
                f"{r['tutorial_seconds_an_epoch']:.3g} ({workers})",
                f"{r['times_as_fast']:.1f}",
            ]
        )
    return header, lines


def limit_rows(found: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of how near the device's limits that is."""
    header = ["case", "network", "first epoch, s", "TFLOP/s", "of a matrix product", "peak memory, GB"]
    lines = []
    for r in found["cases"]:
        memory = "–" if r["peak_memory_gb"] is None else f"{r['peak_memory_gb']:.1f}"
        share = f"{r['share_of_matrix_product']:.0%}"
        lines.append([r["case"], r["network"], f"{r['seconds_before']:.3g}", f"{r['tflops']:.3g}", share, memory])
    return header, lines


def growth_rows(found: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of how an epoch's time grows with the number of images."""
    header = ["seconds an epoch", "network", *(f"{int(n):,} images" for n in found["cases"][0]["seconds_by_images"])]
    times = ([f"{seconds:.3g}" for seconds in r["seconds_by_images"].values()] for r in found["cases"])
    return header, [[r["case"], r["network"], *own] for r, own in zip(found["cases"], times, strict=True)]


def shown(found: dict) -> str:
    """The tables in Markdown, with what they were measured on."""
    batch = found["cases"][0]["batch_size"]
    times, limits, growth = (plots.table(*table(found)).data for table in (rows, limit_rows, growth_rows))
    where = (
        f"{found['device']}, torch {found['torch']}, {found['date']}; batches of {batch}; a large matrix product "
        f"reaches {found['matrix_tflops']:.3g} TFLOP/s there."
    )
    return f"\n{times}\n\n{limits}\n\n{where}\n\n{growth}\n\n"


def publish(found: dict) -> None:
    """Keep a bench in book/published, and show it on its page: a GPU's where there is one."""
    artefacts.save_json(PUBLISHED / f"bench-{found['kind']}.json", found)
    parts = re.split(r"(<!-- bench: (?:begin|end) -->\n?)", PAGE.read_text(encoding="utf-8"))
    if len(parts) == 5:
        parts[2] = shown(recorded())
        PAGE.write_text("".join(parts), encoding="utf-8")


def recorded() -> dict:
    """The published bench: a GPU's where there is one, otherwise a CPU's."""
    path = next(path for kind in ("cuda", "cpu") if (path := PUBLISHED / f"bench-{kind}.json").exists())
    return json.loads(path.read_text(encoding="utf-8"))


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--publish", action="store_true", help="keep the result in book/published and show it")
    parser.add_argument("--images", type=int, help="training images, instead of what the device's setting has")
    options = parser.parse_args(arguments)
    device = pick_device()
    s = setting(device)
    if options.images is not None:
        least = 8 * s.batch_size
        if options.images < least:
            print(f"error: --images is {options.images}: expected at least {least}", file=sys.stderr)
            return 2
        s = dataclasses.replace(s, images=options.images)
    if device.type == "cpu":
        torch.set_num_threads(1)  # as profile quick does: networks so small gain nothing from a second thread
    peak = matrix_flops(s.matrix, device)
    found = {
        "kind": device.type,
        "device": artefacts.device_name(device),
        "torch": torch.__version__.partition("+")[0],
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "matrix_tflops": peak / 1e12,
        "cases": [],
    }
    for case, network in cases(s):
        print(f"{case}, {network} …", flush=True)
        found["cases"].append(measure(case, network, s, device, peak))
    path = profiles.outputs_folder() / f"bench-{device.type}.json"
    artefacts.save_json(path, found)
    if options.publish:
        publish(found)
    for table in (rows, limit_rows, growth_rows):
        print("\n" + plots.text_table(*table(found)))
    print(f"\n{found['device']}; a matrix product reaches {peak / 1e12:.3g} TFLOP/s. Kept in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
